"""Kill `prepare` at random moments and run it again: the store must be byte-identical, and nothing may be left behind.

    python -m tests.benchmarks.kills --data FOLDER

Alternately the whole session and only the parent is killed; in the latter case its processes must end by themselves.
"""

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from tests.benchmarks.contest import members, start
from tests.benchmarks.prepare import TEXTS, written


def ready_and_prepare(tokenizer, path, cache):
    from lit_llm.data.records.sources import Source
    from lit_llm.data.tokens.prepare import prepare
    from lit_llm.text.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    print("ready", flush=True)
    began = time.perf_counter()
    prepare(Source(path), loaded, cache_dir=cache, num_proc=2)
    return time.perf_counter() - began


def finished(*arguments):
    process = start(ready_and_prepare, *arguments)
    out, _ = process.communicate()
    assert process.returncode == 0
    return float(out.splitlines()[-1])


def cut(tokenizer, path, cache, moment, *, whole_session):
    """Kill at that moment; how long its processes outlived it, and whether something half-written was left."""
    process = start(ready_and_prepare, tokenizer, path, cache)
    process.stdout.readline()
    time.sleep(moment)
    (os.killpg if whole_session else os.kill)(process.pid, signal.SIGKILL)
    killed = time.perf_counter()
    process.wait()
    while members(process.pid):
        assert time.perf_counter() - killed < 60, "a process is still running"
        time.sleep(0.05)
    return time.perf_counter() - killed, len(list(Path(cache).glob("*.tmp-*")))


def content(cache):
    return {str(file.relative_to(cache)): file.read_bytes() for file in sorted(Path(cache).rglob("*")) if file.is_file()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        rows, _ = written((args.data / TEXTS[0]).read_text(encoding="utf-8-sig"), folder, args.megabytes << 20)
        what = str(args.data / "models/stories260K-hf"), rows
        took = finished(*what, f"{folder}/whole")
        expected, unfinished, same, longest = content(f"{folder}/whole"), 0, 0, 0.0
        for number in range(args.kills):
            cache = f"{folder}/cut{number}"
            outlived, debris = cut(*what, cache, moments.uniform(0, took), whole_session=bool(number % 2))
            longest, unfinished = max(longest, outlived), unfinished + debris
            finished(*what, cache)
            same += content(cache) == expected
        print(f"{same} of {args.kills} the same, byte for byte, and nothing else in the cache; {unfinished} had left something "
              f"half-written; no process outlived its parent by more than {longest:.1f} s")


if __name__ == "__main__":
    main()
