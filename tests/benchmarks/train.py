"""Compare training speed of several trainers on this machine, as ratios measured in one run.

    python tests/benchmarks/train.py --tokenizer FOLDER --chats A.json B.json --text FILE [--peer PYTHON]
    python tests/benchmarks/train.py --device cuda [--only "8B, LoRA"]      no files are needed; see on_gpu.py
    python tests/benchmarks/train.py --device cuda --only loss      lit_llm, cut-cross-entropy and Liger; see cross_entropy.py

A 6M-parameter Llama with random weights is trained on the conversations. Each contestant has a process of its own; one at a
time runs for some seconds while the others wait. The speed of a machine can change by a third within minutes, so ratios are
computed within a round, and the median over the rounds is printed. A contestant with another loss in the first step is
disqualified. `--peer` is an interpreter with `trl`; without it that row is left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lit_llm.__main__ import HEAP
from tests.benchmarks.contestants import MARK

HERE = Path(__file__).resolve().parent
PAD_TO, SEQ_LEN, GATE = 512, 2048, 16
LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": SEQ_LEN,
         "tie_word_embeddings": True}
# name: (contestant, lit_llm's case to compare with it, required ratio)
CHATS = {
    "the chapter, float32, padded to 512": ({"who": "hf", "bf16": False, "pad_to": PAD_TO, "batch": 16}, 5.0),
    "the chapter in bf16": ({"who": "hf", "bf16": True, "pad_to": PAD_TO, "batch": 16}, 3.0),
    "HF Trainer, bf16, like lengths together": ({"who": "hf", "bf16": True, "group_by_length": True, "batch": 16}, None),
    "TRL, best-fit packing, bf16, sdpa": ({"who": "trl", "bf16": True, "rows": 1}, 2.5),
    "ours, bf16": ({"who": "ours", "bf16": True, "rows": 1, "strategy": "auto"}, None),
    "ours, bf16, ZeRO-1": ({"who": "ours", "bf16": True, "rows": 1, "strategy": "deepspeed_stage_1"}, None),
}
TEXT = {
    "HF Trainer, bf16, blocks of 512": ({"who": "hf", "bf16": True, "pad_to": 512, "batch": 4}, 1.3),
    "ours on text, bf16": ({"who": "ours", "bf16": True, "rows": 4, "strategy": "auto", "packing": "concat"}, None),
}


def build(folder, tokenizer_folder, words=0):
    """The initial model of all contestants with its tokenizer, on request with a larger vocabulary."""
    import torch

    from lit_llm.models import load as model
    from lit_llm.text.tokenizer import Tokenizer

    torch.manual_seed(0)
    tokenizer = Tokenizer.load(tokenizer_folder)
    built = model.init_causal_lm(LLAMA, vocab_size=max(words, tokenizer.vocab_size), bos_token_id=tokenizer.bos_id,
                                 eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    model.save_causal_lm(built, folder, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    tokenizer.save(folder)
    return tokenizer, sum(weight.numel() for weight in built.parameters())


def conversations(tokenizer, files, folder):
    """The same conversations twice: as messages for us, as ids and labels for the others; none longer than PAD_TO."""
    from lit_llm.data.records import formats
    from lit_llm.data.records.sources import Source

    rows, records = [], []
    for file in files:
        for record, _ in Source(file).read():
            conversation = formats.convert(record)
            sequence = tokenizer.encode_conversation(conversation)[0]
            if len(sequence) <= PAD_TO:
                rows.append({"input_ids": sequence.input_ids.tolist(), "labels": sequence.labels.tolist()})
                records.append({"messages": conversation.to_openai()})
    write(folder / "rows.jsonl", rows)
    write(folder / "data.jsonl", records)
    write(folder / "gate.jsonl", records[:GATE])
    return {"rows_file": str(folder / "rows.jsonl"), "data": str(folder / "data.jsonl"),
            "gate": str(folder / "gate.jsonl"), "gate_size": GATE, "seq_len": SEQ_LEN}


def documents(tokenizer, file, folder):
    """Plain text: equal blocks for the others, the text itself for us."""
    from lit_llm.text.conversation import Document

    text = Path(file).read_text(encoding="utf-8")
    ids = tokenizer.encode_document(Document(text)).input_ids.tolist()
    blocks = [ids[at:at + 512] for at in range(0, len(ids) - 512, 512)]
    gate = tokenizer.decode(ids[:500])
    blocks[0] = tokenizer.encode_document(Document(gate)).input_ids.tolist()       # the first step is of the very same ids
    write(folder / "blocks.jsonl", [{"input_ids": block, "labels": block} for block in blocks])
    write(folder / "text.jsonl", [{"text": text}])
    write(folder / "text_gate.jsonl", [{"text": gate}])
    return {"rows_file": str(folder / "blocks.jsonl"), "data": str(folder / "text.jsonl"),
            "gate": str(folder / "text_gate.jsonl"), "gate_size": 1, "seq_len": 512}


def write(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


class Contestant:
    """A process that trains while it is its turn; its thread count is what torch takes by itself."""

    def __init__(self, python, spec, scratch):
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        env["PYTHONPATH"] = str(HERE.parents[1])
        if spec["who"] == "ours":
            env["GLIBC_TUNABLES"] = HEAP            # as `python -m lit_llm fit` starts itself
        self.who, self.errors = spec["who"], (scratch / "errors").open("w+")
        self.process = subprocess.Popen([python, str(HERE / "contestants.py"), json.dumps(spec | {"scratch": str(scratch)})],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env)
        self.first_loss = self._hear("first_loss")
        self._hear("tokens_per_s")                  # of its warm-up

    def turn(self):
        """Real tokens a second."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._hear("tokens_per_s")

    def end(self):
        """Megabytes at its height."""
        self.process.stdin.close()
        return self._hear("peak_mb")

    def _hear(self, name):
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))[name]
        self.errors.seek(0)
        raise SystemExit(f"{self.who} failed:\n{self.errors.read()[-3000:]}")


def race(entries, shared, rounds, peer):
    """Figures of each: of every turn, for every round gives each one, and of the whole."""
    with tempfile.TemporaryDirectory() as place:
        running = {}
        for number, (name, (spec, _)) in enumerate(entries.items()):
            if spec["who"] != "trl" or peer:
                (scratch := Path(place) / str(number)).mkdir()
                print(f"  {name} starts", file=sys.stderr, flush=True)
                running[name] = Contestant(peer if spec["who"] == "trl" else sys.executable, shared | spec | {"lr": 1e-4}, scratch)
        runs = {name: {"speed": [], "first_loss": one.first_loss} for name, one in running.items()}
        for number in range(rounds):
            for name, one in running.items():
                runs[name]["speed"].append(one.turn())
            print(f"  round {number + 1} of {rounds}: " + ", ".join(f"{run['speed'][-1]:,.0f}" for run in runs.values()),
                  file=sys.stderr, flush=True)
        for name, one in running.items():
            runs[name]["peak_mb"] = one.end()
    return runs


def report(entries, runs, own_name):
    """Medians over the rounds, and the quarter of them on either side."""
    print(f"\n| contestant | real tokens/s | {own_name} is faster by | to reach | first loss | peak MB |\n|---|---|---|---|---|---|")
    for name, run in runs.items():
        low, ratio, high = statistics.quantiles(
            [base / speed for base, speed in zip(runs[own_name]["speed"], run["speed"], strict=True)], n=4, method="inclusive")
        print(f"| {name} | {statistics.median(run['speed']):,.0f} | {ratio:.2f} ({low:.2f} to {high:.2f}) | "
              f"{entries[name][1] or ''} | {run['first_loss']:.4f} | {run['peak_mb']:,.0f} |")
        if abs(run["first_loss"] - runs[own_name]["first_loss"]) > 0.02:
            print(f"  OUT: {name} does not compute the same loss")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", help="of the cases on a GPU, those whose name has this in it")
    parser.add_argument("--smoke", action="store_true", help="the cases for a GPU with tiny shapes on the CPU")
    parser.add_argument("--tokenizer")
    parser.add_argument("--chats", nargs="+", default=[])
    parser.add_argument("--text")
    parser.add_argument("--peer", help="an interpreter with trl")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3, help="of each turn, or a step where one takes longer")
    args = parser.parse_args()
    if args.device == "cuda" or args.smoke:
        from tests.benchmarks import cross_entropy, on_gpu

        on_gpu.run(args.only, smoke=args.smoke, seconds=args.seconds)
        cross_entropy.run(args.only, smoke=args.smoke)
        return
    if args.tokenizer is None:
        parser.error("--tokenizer is needed on a CPU")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer, parameters = build(folder / "model", args.tokenizer)
        print(f"a Llama of {parameters:,} parameters, vocabulary {tokenizer.vocab_size:,}")
        shared = {"model": str(folder / "model"), "seconds": args.seconds}
        if args.chats:
            runs = race(CHATS, shared | conversations(tokenizer, args.chats, folder), args.rounds, args.peer)
            report(CHATS, runs, "ours, bf16")
        if args.text:
            runs = race(TEXT, shared | documents(tokenizer, args.text, folder), args.rounds, args.peer)
            report(TEXT, runs, "ours on text, bf16")


if __name__ == "__main__":
    main()
