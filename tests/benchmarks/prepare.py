"""How fast text becomes tokens, as ratios measured in one run.

    python tests/benchmarks/prepare.py --tokenizer FOLDER --text FILE.txt --chats FILE.json

`text`: `prepare`, reading, encoding and writing included, against the bare `tokenizers` batch encoder on the same
documents, held in memory, on the same cores. `chats`: conversations per second, in one process and in as many as there
are cores. `--big N` makes a text of N megabytes and says the peak memory of preparing it.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "true"

from lit_llm.data.prepare import prepare
from lit_llm.data.sources import Source, read
from lit_llm.tokenizer import Tokenizer


def repeated(file, folder, megabytes):
    """The paragraphs of a file over and over, each time others, as JSON lines."""
    texts = [str(record) for record, _ in read(Source(file, document="paragraph"))]
    path, size, turn = Path(folder) / "text.jsonl", 0, 0
    with path.open("w", encoding="utf-8") as stream:
        while size < megabytes << 20:
            for number in range(0, len(texts), 20):
                line = json.dumps({"text": f"{turn}.{number} " + "\n".join(texts[number:number + 20])}, ensure_ascii=False)
                size += len(line.encode())
                stream.write(line + "\n")
            turn += 1
    return str(path)


def bare(tokenizer, file):
    """Tokens per second of the library alone."""
    texts = [record["text"] for record, _ in read(Source(file))]
    began, tokens = time.perf_counter(), 0
    for at in range(0, len(texts), 1000):
        tokens += sum(len(encoding) for encoding in tokenizer.hf.backend_tokenizer.encode_batch_fast(
            texts[at:at + 1000], add_special_tokens=False))
    return tokens / (time.perf_counter() - began)


def ours(*words):
    """What `prepare` takes, in a process of its own for the sake of its peak memory."""
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(words)], stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one(file, tokenizer, cache, num_proc):
    loaded = Tokenizer.load(tokenizer)
    began = time.perf_counter()
    report = prepare(Source(file), loaded, cache_dir=cache, num_proc=num_proc).report
    took = time.perf_counter() - began
    peak = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({"tokens": report.tokens / took, "records": report.kept / took, "peak": peak}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("tokenizer", "text", "chats", "one"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--big", type=int)
    given = parser.parse_args()
    if given.one:
        one(*json.loads(given.one))
        return
    with tempfile.TemporaryDirectory() as folder:
        if given.text:
            file = repeated(given.text, folder, given.big or given.megabytes)
            for number in range(1 if given.big else 3):
                library = 0 if given.big else bare(Tokenizer.load(given.tokenizer), file)
                mine = ours(file, given.tokenizer, f"{folder}/text{number}", None)
                ratio = f", {mine['tokens'] / library:.2f} of the bare encoder's {library:,.0f}" if library else ""
                print(f"text: {mine['tokens']:,.0f} tokens/s{ratio}; peak memory {mine['peak'][0]:.0f} MB, largest "
                      f"process beside it {mine['peak'][1]:.0f} MB", flush=True)
        for num_proc in (1, None) if given.chats else ():
            mine = ours(given.chats, given.tokenizer, f"{folder}/chats{num_proc}", num_proc)
            print(f"chats, {num_proc or 'all'} processes: {mine['records']:,.0f} records/s, {mine['tokens']:,.0f} tokens/s")


if __name__ == "__main__":
    main()
