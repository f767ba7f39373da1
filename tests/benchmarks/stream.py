"""Measure streaming: speed compared with stored tokens, memory, and time to resume.

    python tests/benchmarks/stream.py --tokenizer DIR [--megabytes 300] [--num_proc 2]

The corpus is generated: JSON lines of random words. Each contestant runs in a process of its own; peak memory is that of the
process, beyond its memory after loading the tokenizer.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lit_llm.data.records.sources import Source
from lit_llm.data.stream.chunks import Stream
from lit_llm.data.stream.loader import StreamLoader
from lit_llm.data.tokens.encode import SourceEncoder
from lit_llm.data.tokens.prepare import prepare
from lit_llm.text.tokenizer import Tokenizer


def write(path, megabytes):
    """Records of 20 to 600 words from the samples."""
    from lit_llm.samples import documents

    drawn = random.Random(0)
    words = " ".join(path.read_text(encoding="utf-8") for path in Path(documents.__file__).parent.glob("*.py")).split()
    lines = [json.dumps({"text": " ".join(drawn.choices(words, k=drawn.randint(20, 600)))}) + "\n"
             for _ in range(2000)]
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes << 20:
            size += file.write(drawn.choice(lines))


def memory():
    """Peak of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loader(file, tokenizer, num_proc, steps):
    stream = Stream([SourceEncoder(Source(file), tokenizer)], seq_len=2048, packing="best_fit", overlong="cut", seed=0,
                    buffer=4_000_000, num_proc=num_proc)
    return StreamLoader(stream, steps=steps, batch_size=8, pad_id=0, token_bytes=tokenizer.token_bytes)


def streamed(file, tokenizer, num_proc):
    """One pass."""
    made, base, began, tokens, rows = loader(file, tokenizer, num_proc, 10**6), memory(), time.perf_counter(), 0, 0
    for batch in made:
        tokens, rows = tokens + batch["num_tokens"], rows + 8
        if made.passes[0]:
            break
    took = time.perf_counter() - began
    state = made.state_dict()
    fill = tokens / (rows * 2048)
    again = loader(file, tokenizer, 1, 10)
    state["cursors"][0] |= {"turn": 0, "part": 0, "record": state["cursors"][0]["drawn"]}   # at the file's very end
    peak, began = memory(), time.perf_counter()
    again.load_state_dict(state)
    next(iter(again))
    return {"tokens/s": tokens / took, "tokens": tokens, "fill": fill, "more memory, MB": peak - base,
            "seconds to resume at the end": time.perf_counter() - began}


def stored(file, tokenizer, num_proc):
    """Only tokenizing, into a store."""
    base, began = memory(), time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:
        store = prepare(Source(file), tokenizer, cache_dir=cache, num_proc=num_proc)
        tokens = store.report.tokens
    return {"tokens/s": tokens / (time.perf_counter() - began), "tokens": tokens, "more memory, MB": memory() - base}


def read(file, tokenizer, num_proc):
    """Only parsing, which every process does for all of the corpus."""
    began = time.perf_counter()
    count = sum(1 for _ in Source(file).scan())
    return {"MB/s": (Path(file).stat().st_size >> 20) / (time.perf_counter() - began), "records": count}


CONTESTANTS = {"read": read, "stored": stored, "streamed": streamed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--num_proc", type=int, default=2)
    parser.add_argument("--one")
    args = parser.parse_args()
    if args.one:
        name, file = json.loads(args.one)
        print(json.dumps(CONTESTANTS[name](file, Tokenizer.load(args.tokenizer), args.num_proc)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file, figures = f"{folder}/data.jsonl", {}
        write(Path(file), args.megabytes)
        for name in CONTESTANTS:
            done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", json.dumps([name, file])],
                                  stdout=subprocess.PIPE, text=True, check=True)
            figures[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, {key: round(value, 3) for key, value in figures[name].items()}, flush=True)
        print(f"streamed at {figures['streamed']['tokens/s'] / figures['stored']['tokens/s']:.2f} of the stored way")


if __name__ == "__main__":
    main()
