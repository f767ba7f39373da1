"""Count how many of some dozens of a user's questions the toy answers exactly after the README's recipe.

    python tests/benchmarks/own_questions.py [FILE ...] [--base FOLDER] [--out FOLDER]

Each file has records like {"conversations": [{"role": "user", ...}, {"role": "assistant", ...}]}; without a file, the 50
everyday questions beside this script are used.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_llm.inference.completion import TextEngine
from lit_llm.inference.sampling import SamplingParams
from lit_llm.text.conversation import Conversation

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = Path(__file__).with_name("own_questions.jsonl")


def exact(folder: Path, file: Path) -> tuple[int, list[tuple[str, str]]]:
    """How many first answers of a file a model gives word for word, and the failed questions with its answers."""
    engine = TextEngine.load(folder)
    right, wrong = 0, []
    for line in file.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["conversations"]
        answer = engine.generate(Conversation.from_openai(turns[:1]), SamplingParams(max_tokens=300, temperature=0)).text
        if answer.strip() == turns[1]["content"].strip():
            right += 1
        else:
            wrong.append((turns[0]["content"], answer))
    return right, wrong


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[QUESTIONS])
    parser.add_argument("--base", default="sample:base")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp())
    for file in options.files:
        started = time.monotonic()
        subprocess.run([sys.executable, "-m", "lit_llm", "fit", "--config",
                        ROOT / "configs/own_questions.yaml", "--model.base", options.base, "--data.sources", json.dumps([{"path": str(file.resolve())}]),
                        "--trainer.default_root_dir", out / file.stem], check=True, stdout=subprocess.DEVNULL)
        right, wrong = exact(out / file.stem / "export", file)
        print(f"{file}: {right} of {right + len(wrong)} exact, {time.monotonic() - started:.0f} s", flush=True)
        for question, answer in wrong[:5]:
            print(f"  {question!r} -> {answer!r}")


if __name__ == "__main__":
    main()
