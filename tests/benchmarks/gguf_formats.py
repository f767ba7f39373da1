"""Compare GGUF files in llama.cpp with their models in transformers: families, formats and real tokenizers.

Tiny models with random weights, and two trained ones, are written by `export --format gguf` in each format. For each the
table has the absolute difference of the NLL in nats per token (llama.cpp's minus transformers' in float32, on embedded
documents) and the largest of the reference sequences; then whether greedy text, a rendered conversation and the texts of
`tokenizer_file.STRESS` are equal. Needs a Python with llama_cpp in LIT_LLM_LLAMA_CPP, and the shared data folder.

    LIT_LLM_LLAMA_CPP=.../bin/python python -m tests.benchmarks.gguf_formats --data ../shared/data
"""

import argparse
import json
import logging
import subprocess
import tempfile
import warnings
from pathlib import Path

from lit_llm.exports.gguf import file, folder, probe, proof
from lit_llm.names import resolve
from lit_llm.text import check
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.text.tokenizer_file import STRESS
from tests import gguf_models

TOKENIZERS = {"llama": "llama2", "llama 3": "llama3", "llama, biases": "minimind", "mistral": "llama2", "qwen2": "qwen2",
              "qwen3": "minimind", "gemma3": "stories", "phi3": "phi3", "phi3, long": "phi3", "smollm3": "llama3"}


def tokenizer_of(name: str, data: Path, work: Path, made: dict[str, str]) -> str:
    """Folder of a real tokenizer, converted once."""
    if name == "minimind":
        return str(data / "tokenizers" / "minimind")
    if name == "stories":
        return str(data / "models" / "stories260K-hf")
    if name not in made:
        place = work / f"tokenizer-{name}"
        place.mkdir()
        made[name] = getattr(gguf_models, f"{name}_tokenizer")(data, place)
    return made[name]


def stress(path: Path, source: Path) -> str:
    """How many stress texts llama.cpp splits into the same tokens."""
    tokenizer = Tokenizer.load(str(source))
    request = {"model": str(path), "rows": [], "texts": list(STRESS), "prompt": [0], "new_tokens": 0, "context": 32}
    done = subprocess.run([str(proof.python()), probe.__file__], input=json.dumps(request), capture_output=True, text=True, check=True)
    pairs = zip(STRESS, json.loads(done.stdout.splitlines()[-1])["tokens"], strict=True)
    different = [text for text, tokens in pairs if tokens != tokenizer.encode_text(text)]
    for text in different:
        print("   other tokens:", repr(text[:60]), flush=True)
    return f"{len(STRESS) - len(different)} of {len(STRESS)}"


def row(name: str, source: Path, work: Path, kinds: list[str]) -> None:
    """Print one model's line of the table."""
    cells, equal, texts = [], "", ""
    for kind in kinds:
        out = folder.write(source, work / "out", "tiny", kind, prove=True)
        facts = json.loads((out / check.NAME).read_text())
        found, rows = facts["measured"], facts["rows"]
        apart = abs(found["nll_after"] - found["nll_before"])
        cells.append(f"{apart:.0e} ({max(abs(each['nll_after'] - each['nll_before']) for each in rows):.0e})")
        if kind == "f32":
            own = facts["llama_cpp"]
            equal = "/".join("yes" if own[key] else str(own[key]) for key in ("greedy_equal", "conversation_equal"))
            texts = stress(out / f"tiny-{kind.upper()}.gguf", source)
    print(f"| {name} | {' | '.join(cells)} | {equal} | {texts} |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the shared data folder")
    parser.add_argument("--kinds", nargs="+", default=list(file.TYPES), help="formats")
    parser.add_argument("--only", nargs="+", default=["trained", *gguf_models.MODELS], help="models")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    print(f"| model (tokenizer) | {' | '.join(options.kinds)} | greedy/conversation | texts |\n|{'---|' * (len(options.kinds) + 3)}")
    with tempfile.TemporaryDirectory() as place:
        work, made = Path(place), {}
        if "trained" in options.only:
            row("stories260K (llama, own)", options.data / "models" / "stories260K-hf", work, options.kinds)
            row("sample:base (llama, own)", Path(resolve("sample:base")), work, options.kinds)
        for name in [each for each in options.only if each in gguf_models.MODELS]:
            tokenizer = tokenizer_of(TOKENIZERS[name], options.data, work, made)
            source = gguf_models.build(work / name.replace(" ", "_"), name, tokenizer)
            row(f"{name} ({TOKENIZERS[name]})", source, work, options.kinds)


if __name__ == "__main__":
    main()
