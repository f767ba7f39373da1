"""Compare loss kernels on a GPU: this project's and others'. The part of `train.py --device cuda` with the "loss" cases.

Forward and backward pass of 8,192 supervised tokens from hidden states and a bf16 head, each in a process of its own: median
milliseconds, peak additional bytes, and |error| / |gradient| of the first 256 tokens against float64. `--smoke` runs
this project's kernel with tiny shapes on the CPU.
"""

import statistics
import time

from tests.benchmarks import on_gpu
from tests.benchmarks.contest import alone

TOKENS, FEW, ROUNDS = 8192, 256, 10
SHAPES = {"Qwen3-0.6B": "QWEN3_06B", "Llama-3-8B": "LLAMA3_8B"}
WAYS = ("fused", "cut_cross_entropy", "liger")
CASES = {f"loss, {model}, {'frozen head' if frozen else 'head learns'}, {by}": (key, frozen, by)
         for model, key in SHAPES.items() for frozen in (False, True) for by in WAYS}


def draw(shape, tokens, frozen):
    """Hidden states, labels and a head whose logits are spread as a trained model's are: targets are its own."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    width, words = shape["hidden_size"], shape["vocab_size"]
    head = nn.Linear(width, words, bias=False, device=on_gpu.device(), dtype=torch.bfloat16).requires_grad_(not frozen)
    hidden = torch.randn(tokens, width, device=head.weight.device, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.normal_(std=3 / width**0.5)
        labels = torch.cat([torch.multinomial(head(part).float().softmax(-1), 1)[:, 0] for part in hidden.split(512)])
    return hidden.requires_grad_(), labels.roll(1), head


def errors(hidden, labels, head, by):
    """(of the loss, of the gradients of hidden states and head) against float64, relative."""
    import torch
    from torch.nn import functional as F

    from lit_llm.training.loss import nll_sum

    leaves = [hidden, *(weight for weight in head.parameters() if weight.requires_grad)]
    actual = nll_sum(hidden, labels, head, by=by, count=len(labels) - 1).total
    expected = F.cross_entropy(hidden.double()[:-1] @ head.weight.double().T, labels[1:], reduction="sum")
    pairs = zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True)
    apart = [float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs]
    return [abs(actual.item() / expected.item() - 1), *apart]


def measure(name, smoke):
    """One case."""
    import torch

    import tests.random_models as shapes
    from lit_llm.training.loss import nll_sum

    key, frozen, by = CASES[name]
    shape = getattr(shapes, key) | (shapes.SMALL if smoke else {})
    hidden, labels, head = draw(shape, FEW if smoke else TOKENS, frozen)
    took, peak = [], 0
    for _ in range(2 + ROUNDS):
        hidden.grad = head.weight.grad = None
        on_gpu.wait()
        before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
        if before:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        nll_sum(hidden, labels, head, by=by, count=len(labels) - 1).total.backward()
        on_gpu.wait()
        took.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() - before if before else 0
    few = hidden.detach()[:FEW].requires_grad_()
    hidden.grad = head.weight.grad = None
    return {"ms": 1000 * statistics.median(took[2:]), "peak": peak, "errors": errors(few, labels[:FEW], head, by)}


def obstacle(by, smoke):
    """Why a way cannot go here."""
    from importlib.util import find_spec

    if by != "fused" and smoke:
        return "Triton needs a CUDA device"
    package = {"cut_cross_entropy": "cut_cross_entropy", "liger": "liger_kernel"}.get(by)
    return f"{package} is not installed" if package and find_spec(package) is None else None


def run(only, *, smoke):
    """Print a table, line by line as cases end."""
    chosen = [name for name in CASES if not only or only in name]
    if chosen:
        print("\n| case | ms | peak GiB | error of the loss | of hidden states' gradient | of the head's |\n|---|---|---|---|---|---|")
    for name in chosen:
        why = obstacle(CASES[name][2], smoke)
        if why:
            print(f"| {name} | skipped: {why} |", flush=True)
            continue
        try:
            seen = alone(measure, name, smoke)
        except SystemExit as error:
            print(f"| {name} | failed: {error} |", flush=True)
            continue
        shown = " | ".join(f"{error:.1e}" for error in seen["errors"])
        print(f"| {name} | {seen['ms']:.2f} | {seen['peak'] / 2**30:.2f} | {shown}{' | ' if len(seen['errors']) == 2 else ''} |", flush=True)
