"""Measure speed and memory of tokenizing documents, compared with the plain `tokenizers` batch encoder.

    python -m tests.benchmarks.prepare --data FOLDER                the real texts, several tokenizers
    python -m tests.benchmarks.prepare --data FOLDER --memory 2000  peak memory of corpora of so many megabytes

The plain encoder gets the same documents as strings in memory and all cores, and discards its ids; `prepare` reads them from
disk, as JSON lines and as one text file, and writes the store.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.benchmarks.contest import alone, medians, memory, start, watch

TEXTS = ("pretrain/war_and_peace.txt", "pretrain/hongloumeng.txt", "pretrain/wiki_demo.txt")
TOKENIZERS = ("tokenizers/qwen2", "gpt2", "models/stories260K-hf")


def documents(text, size):
    """Stretches of some 2,000 characters of a text, over and over, each time others, up to `size` characters."""
    paragraphs = [part for part in text.split("\n") if part.strip()]
    for turn in itertools.count():
        lines, length = [f"{turn}."], 0
        for paragraph in paragraphs:
            lines.append(paragraph)
            length += len(paragraph)
            if length > 2000:
                size -= length
                yield "\n".join(lines)
                lines, length = [f"{turn}."], 0
            if size <= 0:
                return


def written(text, folder, size):
    """The documents as JSON lines and as one text file."""
    paths = [f"{folder}/text.jsonl", f"{folder}/text.txt"]
    with open(paths[0], "w", encoding="utf-8") as rows, open(paths[1], "w", encoding="utf-8") as whole:
        for document in documents(text, size):
            rows.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
            whole.write(document + "\n")
    return paths


def bare(tokenizer, rows):
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from lit_llm.text.tokenizer import Tokenizer

    encode = Tokenizer.load(tokenizer).hf.backend_tokenizer.encode_batch_fast
    with open(rows, encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    with watch() as took:
        tokens = sum(len(encoding) for at in range(0, len(texts), 1000)
                     for encoding in encode(texts[at:at + 1000], add_special_tokens=False))
    return rates(tokens, took)


def lit_llm_prepare(tokenizer, path, num_proc=None):
    from lit_llm.data.records.sources import Source
    from lit_llm.data.tokens.prepare import prepare
    from lit_llm.text.tokenizer import Tokenizer

    loaded = Tokenizer.load(tokenizer)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as cache, watch() as took:
        report = prepare(Source(path), loaded, cache_dir=cache, num_proc=num_proc).report
    return rates(report.tokens, took)


def rates(tokens, took):
    return {"tokens": tokens, "rate": tokens / took["seconds"], "cpu": took["cpu"] / tokens * 1e6}


def gpt2(data, folder):
    """GPT-2's published files under the names that transformers reads."""
    target = Path(folder) / "gpt2"
    target.mkdir()
    for old, new in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (target / new).write_bytes((Path(data) / "tokenizers/gpt2" / old).read_bytes())
    (target / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}')
    return str(target)


def speed(data, folder, megabytes, rounds, only):
    print(f"{'text':<20} {'tokenizer':<16} {'bare':>11} {'jsonl':>6} {'txt':>6}   cpu: {'bare':>5} {'jsonl':>6} {'txt':>6}")
    for text, name in itertools.product(TEXTS, [name for name in TOKENIZERS if only in name]):
        tokenizer = gpt2(data, tempfile.mkdtemp(dir=folder)) if name == "gpt2" else str(data / name)
        rows, whole = written((data / text).read_text(encoding="utf-8-sig"), folder, megabytes << 20)
        of = medians(rounds, {"bare": partial(alone, bare, tokenizer, rows), "jsonl": partial(alone, lit_llm_prepare, tokenizer, rows),
                              "txt": partial(alone, lit_llm_prepare, tokenizer, whole)})
        wall = [of[way]["rate"] / of["bare"]["rate"] for way in ("jsonl", "txt")]
        cpu = [of["bare"]["cpu"] / of[way]["cpu"] for way in ("jsonl", "txt")]
        print(f"{Path(text).name:<20} {Path(name).name:<16} {of['bare']['rate']:>11,.0f} {wall[0]:>6.2f} {wall[1]:>6.2f}   "
              f"{of['bare']['cpu']:>8.2f} us {cpu[0]:>6.2f} {cpu[1]:>6.2f}", flush=True)


def chats(data, path, size):
    """Alpaca's demos over and over, each time others."""
    pairs = [one for name in ("en", "zh")
             for one in json.loads((data / f"sft/llamafactory/alpaca_{name}_demo.json").read_text(encoding="utf-8"))]
    with open(path, "w", encoding="utf-8") as stream:
        while stream.tell() < size:
            turn = stream.tell()
            for pair in pairs:
                stream.write(json.dumps(pair | {"instruction": f"{turn}. {pair['instruction']}"}, ensure_ascii=False) + "\n")
    return path


def peak(data, folder, megabytes, kinds):
    """Sampled five times a second over all processes together."""
    size = megabytes * 1_000_000
    paths = dict(zip(("jsonl", "txt"), written((data / TEXTS[0]).read_text(encoding="utf-8-sig"), folder, size), strict=True))
    for kind in kinds:
        path = paths.get(kind) or chats(data, f"{folder}/chats.jsonl", size)
        process, most = start(lit_llm_prepare, str(data / TOKENIZERS[0]), path), (0.0, 0.0)
        while process.poll() is None:
            most = tuple(map(max, most, memory(process.pid)))
            time.sleep(0.2)
        figures = json.loads(process.stdout.read().splitlines()[-1])
        print(f"{kind:<6} {Path(path).stat().st_size / 1e6:,.0f} MB, {figures['rate']:,.0f} tokens/s: peak "
              f"{most[0]:,.0f} MB (sum of RSS {most[1]:,.0f} MB)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=40, help="of text for the speed")
    parser.add_argument("--only", default="", help="a part of the tokenizers' names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="MEGABYTES")
    parser.add_argument("--kinds", nargs="+", default=["jsonl", "txt", "chats"], help="of corpus for the memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            peak(args.data, folder, args.memory, args.kinds)
        else:
            speed(args.data, folder, args.megabytes, args.rounds, args.only)


if __name__ == "__main__":
    main()
