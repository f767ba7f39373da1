"""Measure the end-to-end gain of each kernel of this project on a CPU: a training step or validation batch with and without it.

    python -m tests.benchmarks.kernel_times [--rounds 9] [--vocabulary 32000] [--lengths 60 300 ...] [--dtypes bfloat16]

The model is a 6M-parameter Llama on a packed sequence of random documents, with one thread. All variants take turns in one
process; the printed ratio is the median over the rounds of CPU time without the kernel / CPU time with all kernels.
CUDA is not measured here: blockwise attention, the norms and oneDNN's tiles are for CPUs, the Triton kernel is for CUDA.
"""

import argparse
import statistics
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch

from lit_llm.kernels import attention, rmsnorm, switch
from lit_llm.models.load import init_causal_lm
from lit_llm.training import loss
from lit_llm.training.forward import Choices, Way, nll
from tests.benchmarks.train import LLAMA

OFF = SimpleNamespace(is_plain=lambda: True)
WITHOUT = {"blockwise": attention, "rmsnorm": rmsnorm, "cross_entropy": loss}       # the module that reads the switch


@contextmanager
def without(*names):
    """Some kernels off."""
    with ExitStack() as undo:
        for name in names:
            WITHOUT[name].switch = OFF
            undo.callback(setattr, WITHOUT[name], "switch", switch)
        yield


def batch_of(lengths, vocabulary):
    """A packed sequence as the loader makes it; all tokens except each document's first are supervised."""
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.randint(vocabulary, (1, int(borders[-1])))
    labels = ids.clone()
    labels[0, borders[:-1].long()] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seqlens": borders, "max_seqlen": max(lengths), "num_supervised": int((labels != -100).sum())}


def contestants(dtype, batch, vocabulary):
    """(Name of what is off, step of training, validation batch)."""
    for off in ([], ["blockwise"], ["rmsnorm"], ["cross_entropy"], [*WITHOUT]):
        torch.manual_seed(0)
        model = init_causal_lm(LLAMA, attention=attention.register(), vocab_size=vocabulary)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        with without(*off):
            rmsnorm.use_fast_norms(model)

        def train(model=model, optimizer=optimizer, off=off):
            with without(*off), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                total = nll(model.train(), batch, Choices(Way())).total
            total.backward()
            optimizer.step()
            optimizer.zero_grad()

        def measure(model=model, off=off):
            with without(*off), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                nll(model.eval(), batch, Choices(Way()))

        yield "+".join(off) or "none", train, measure


def timed(run):
    """CPU seconds; with one thread, what other programs do counts little."""
    began = time.process_time()
    run()
    return time.process_time() - began


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--vocabulary", type=int, default=32000)
    options.add_argument("--lengths", type=int, nargs="+", default=[40, 90, 350, 120, 700, 60, 230, 30, 180, 248])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = batch_of(chosen.lengths, chosen.vocabulary)
    for dtype in [getattr(torch, name) for name in chosen.dtypes]:
        every = list(contestants(dtype, batch, chosen.vocabulary))
        for kind, place in (("training step", 1), ("validation batch", 2)):
            times = {case[0]: [] for case in every}
            for turn in range(chosen.rounds + 1):       # the first is for warming up
                for case in every[turn % 2:] + every[:turn % 2]:
                    times[case[0]].append(timed(case[place]))
            base = times["none"][1:]
            for name, taken in times.items():
                ratios = [other / own for other, own in zip(taken[1:], base, strict=True)]
                print(f"{dtype} {kind}, without {name}: {statistics.median(ratios):.3f} "
                      f"({min(ratios):.2f} to {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
