"""Compare time and additional memory of a validation: this project's perplexity and torchmetrics' on logits.

    python tests/benchmarks/perplexity.py --tokenizer FOLDER --chats A.json B.json [--words 32000] [--bf16]

The model is the 6M-parameter Llama of `train.py` with random weights, on its conversations, in two comparisons.

The head alone: sequences of 2,048 tokens, packed as in `validate` and sampled evenly. Both get the last hidden states of a
sequence in turn; time is that of all sequences, the median over turns. Memory is measured in separate turns, because
measuring it takes time. With more than about nine of ten tokens supervised, the product of hidden states and vocabulary
dominates both.

The whole validation: `validate` over every fourth conversation, compared with transformers' model on batches of 16 padded to
their longest sequence, whose logits torchmetrics gets. Both run once before the measurement, so that data and libraries are
loaded. `--words` gives the model a larger vocabulary than the tokenizer's.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torchmetrics.text import Perplexity as TheirPerplexity

from lit_llm.__main__ import HEAP
from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.models import anatomy
from lit_llm.models import load as models
from lit_llm.system import library_warnings
from lit_llm.training.loss import nll_sum
from lit_llm.training.metrics import Perplexity
from lit_llm.training.module import CausalLMModule
from lit_llm.training.trainer import Trainer
from tests.benchmarks.parts import Peak
from tests.benchmarks.train import SEQ_LEN, build, conversations


def validation(tokenizer, files, count):
    """Rows of what `validate` would read, spread evenly over all of them."""
    with tempfile.TemporaryDirectory() as folder:
        sources = [Source(file) for file in files]
        data = TextDataModule(sources, sources, tokenizer=tokenizer, seq_len=SEQ_LEN, batch_size=1, cache_dir=folder)
        data.prepare_data()
        data.setup("validate")
        rows = list(data.val_dataloader())
        return rows[len(rows) // count // 2::len(rows) // count][:count]


class Ours:
    def __init__(self, head):
        self.head, self.metric = head, Perplexity()

    def __call__(self, hidden, row):
        total, correct = nll_sum(hidden[0], row["labels"][0], self.head, count=row["num_supervised"])
        self.metric.update(total, row["num_supervised"], 0, correct)

    def value(self):
        return self.metric.report()["perplexity"]


class Theirs:
    def __init__(self, head):
        self.head, self.metric = head, TheirPerplexity(ignore_index=-100)

    def __call__(self, hidden, row):
        self.metric.update(self.head(hidden)[:, :-1].float(), row["labels"][:, 1:])

    def value(self):
        return float(self.metric.compute())


def race(contestants, rows, turns):
    """Seconds of each for all sequences, for every turn except the first; both alternate sequence by sequence."""
    times = []
    for _ in range(turns + 1):
        took = [0.0] * len(contestants)
        for hidden, row in rows:
            for place, contestant in enumerate(contestants):
                began = time.perf_counter()
                contestant(hidden, row)
                took[place] += time.perf_counter() - began
        times.append(took)
    return times[1:]


def most_memory(contestant, rows):
    with Peak() as peak:
        for hidden, row in rows:
            contestant(hidden, row)
    return peak.mb


def head_alone(args, folder):
    rows = validation(args.tokenizer, args.chats, args.rows)
    inner = models.load_causal_lm(str(folder)).eval()
    backbone, head = anatomy.backbone(inner), anatomy.head(inner)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        seen = [(backbone(input_ids=row["input_ids"], position_ids=row["position_ids"]).last_hidden_state, row) for row in rows]
        contestants = Ours(head), Theirs(head)
        head.weight.sum()                           # it is in a mapped file, which was not read before
        memory = [most_memory(contestant, seen[:1]) for contestant in contestants]      # before freed memory can be reused
        times = race(contestants, seen, args.turns)
    share = sum(row["num_supervised"] for row in rows) / sum(row["labels"].numel() for row in rows)
    return f"the head alone, {len(rows)} rows, {share:.0%} supervised", times, memory, [one.value() for one in contestants]


def give_back():
    """What earlier passes freed goes to the system, or the next would find it there and take no more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def padded_batches(file):
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    for start in range(0, len(rows), 16):
        batch = rows[start:start + 16]
        longest = max(len(row["input_ids"]) for row in batch)
        yield {key: torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in batch])
               for key, fill in (("input_ids", 0), ("labels", -100))} | {
            "attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch])}


def the_whole(args, folder, tokenizer):
    from transformers import AutoModelForCausalLM

    shared = conversations(tokenizer, args.chats, folder.parent)
    for name in ("rows_file", "data"):              # every fourth of them is enough
        lines = Path(shared[name]).read_text(encoding="utf-8").splitlines()[::4]
        Path(shared[name]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    inner = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    batches = list(padded_batches(shared["rows_file"]))
    source = [Source(shared["data"])]
    data = TextDataModule(source, source, tokenizer=str(folder), seq_len=SEQ_LEN, batch_size=1, cache_dir=str(folder / "cache"))
    module = CausalLMModule(base=str(folder))
    trainer = Trainer(accelerator="cpu", devices=1, precision="bf16-mixed" if args.bf16 else "32-true", logger=False,
                      default_root_dir=str(folder / "run"), enable_progress_bar=False, enable_checkpointing=False)

    def lit_llm_nll():
        return trainer.validate(module, datamodule=data, verbose=False)[0]["val/perplexity"]

    @torch.no_grad()
    def transformers_nll():
        metric = TheirPerplexity(ignore_index=-100)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            for batch in batches:
                logits = inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                metric.update(logits[:, :-1].float(), batch["labels"][:, 1:])
        return float(metric.compute())

    contestants, times, memory = (lit_llm_nll, transformers_nll), [], []
    values = [contestant() for contestant in contestants]       # ours also reads the data then, theirs has it read
    for contestant in contestants:
        give_back()
        with Peak() as peak:
            contestant()
        memory.append(peak.mb)
    for _ in range(2):
        times.append([])
        for contestant in contestants:
            began = time.perf_counter()
            contestant()
            times[-1].append(time.perf_counter() - began)
    return f"the whole, {len(lines):,} conversations", times, memory, values


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--chats", nargs="+", required=True)
    parser.add_argument("--words", type=int, default=0)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:          # both, as the command line does it
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"GLIBC_TUNABLES": HEAP})
    library_warnings.listen()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        tokenizer, _ = build(folder, args.tokenizer, args.words)
        for name, times, memory, values in (head_alone(args, folder), the_whole(args, folder, tokenizer)):
            print(f"{name}, {max(tokenizer.vocab_size, args.words):,} words, {'bf16' if args.bf16 else 'float32'}")
            for who, took, mb, value in zip(("ours", "torchmetrics"), zip(*times, strict=True), memory, values, strict=True):
                print(f"  {who}: perplexity {value:.6f}, {1000 * statistics.median(took):,.0f} ms, {mb:.0f} MB more")
            print(f"  time {statistics.median(slow / quick for quick, slow in times):.2f}, memory {memory[1] / memory[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
