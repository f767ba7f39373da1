"""Compare the speed of the loader with that of training: tokens/s of the loader alone and of a training step.

    python -m tests.benchmarks.loader --data FOLDER

The step is that of the embedded toy Llama (forward, loss, backward, AdamW) on one of the same batches. It is the fastest
model here, so it needs the fastest loader. `--threads` are those of the step; on a busy machine more threads are slower.
"""

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from tests.benchmarks.contest import alone, medians


def module(file, cache, seq_len, batch_size):
    from lit_llm.data.datamodule import TextDataModule
    from lit_llm.data.records.sources import Source

    made = TextDataModule([Source(file)], tokenizer="sample:base", seq_len=seq_len, batch_size=batch_size, cache_dir=cache,
                          on_bad_record="quarantine")
    made.prepare_data()
    made.setup("fit")
    return made


def rate(tokens, calls, seconds=3.0):
    """Tokens per second of a call that is repeated for a while."""
    next(calls)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        next(calls)
        done += tokens
    return {"rate": done / (time.perf_counter() - began)}


def loader(*arguments):
    rows = module(*arguments).train_dataloader()
    batches = (batch for _ in iter(int, 1) for batch in rows)
    return rate(arguments[2] * arguments[3], batches)


def step(threads, *arguments):
    import torch

    from lit_llm.kernels import attention
    from lit_llm.models import anatomy
    from lit_llm.models import load as model
    from lit_llm.names import resolve
    from lit_llm.training.loss import nll_sum

    torch.set_num_threads(threads)
    llama = model.load_causal_lm(resolve("sample:base"), attention=attention.NAME).train()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4)
    batch = next(iter(module(*arguments).train_dataloader()))

    def steps():
        while True:
            hidden = anatomy.backbone(llama)(
                input_ids=batch["input_ids"].view(1, -1), position_ids=batch["position_ids"].view(1, -1), use_cache=False,
                attention_mask=None, cu_seqlens=batch["cu_seqlens"], max_seqlen=batch["max_seqlen"]).last_hidden_state[0]
            (nll_sum(hidden, batch["labels"].view(-1), anatomy.head(llama)).total / batch["num_supervised"]).backward()
            optimizer.step()
            optimizer.zero_grad()
            yield

    return rate(arguments[2] * arguments[3], steps())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    file = str(args.data / "sft/llamafactory/alpaca_en_demo.json")
    with tempfile.TemporaryDirectory() as cache:
        for seq_len, batch_size in ((256, 8), (1024, 4), (2048, 8)):
            words = (file, cache, seq_len, batch_size)
            of = medians(args.rounds, {"loader": partial(alone, loader, *words), "step": partial(alone, step, args.threads, *words)})
            fed, eaten = of["loader"]["rate"], of["step"]["rate"]
            print(f"{batch_size} rows of {seq_len}: the loader {fed:,.0f} tokens/s, the step {eaten:,.0f}, {fed / eaten:,.0f} "
                  "times fewer", flush=True)


if __name__ == "__main__":
    main()
