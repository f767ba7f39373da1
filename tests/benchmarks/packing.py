"""Measure how full packed sequences are, and how long packing takes.

    python -m tests.benchmarks.packing --data FOLDER
"""

import argparse
import resource
import tempfile
from functools import partial
from pathlib import Path

from tests.benchmarks.contest import alone, medians, watch


def pack(count, seq_len):
    """Lengths like those of chats: lognormal, half of them below 256 tokens, a few longer than a packed sequence."""
    import numpy as np

    from lit_llm.data.rows import packing

    lengths = np.random.default_rng(0).lognormal(np.log(256), 1.0, count).astype(np.int64).clip(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with watch() as took:
        segments = packing.split(lengths, np.zeros(count, bool), seq_len=seq_len).segments
        rows = packing.pack(segments, seq_len=seq_len, packing="best_fit")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": took["seconds"], "cpu": took["cpu"], "rows": len(rows), "peak": peak / 1024, "before": before / 1024,
            "fill": int(rows.lengths.sum()) / (len(rows) * seq_len)}


def fill(file, tokenizer, seq_len):
    import os

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source

    with tempfile.TemporaryDirectory() as cache:
        module = TextDataModule([Source(file)], tokenizer=tokenizer, seq_len=seq_len, cache_dir=cache, num_proc=1,
                                on_bad_record="quarantine")
        module.prepare_data()
        module.setup("fit")
        rows = module.plans["train"].rows
        return {"rows": len(rows), "fill": int(rows.lengths.sum()) / (len(rows) * seq_len)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    for name in ("en", "zh"):
        of = alone(fill, str(args.data / f"sft/llamafactory/alpaca_{name}_demo.json"), str(args.data / "tokenizers/qwen2"), 2048)
        print(f"alpaca_{name}_demo: {of['rows']} rows of 2048, {of['fill']:.2%} full", flush=True)
    for seq_len in (512, 2048, 8192, 32768):
        of = medians(args.rounds, {"pack": partial(alone, pack, args.count, seq_len)})["pack"]
        print(f"{args.count:,} lengths, rows of {seq_len:>5}: {of['seconds']:.1f} s ({of['cpu']:.1f} s of a core), peak "
              f"{of['peak']:,.0f} MB, {of['rows']:,.0f} rows, {of['fill']:.3%} full", flush=True)


if __name__ == "__main__":
    main()
