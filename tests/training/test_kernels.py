"""If this breaks: loss and gradient on a GPU differ from those on a CPU, or a GPU without a compiler cannot train.

The Triton kernel runs here under Triton's interpreter on CPU tensors, and is compiled for GPUs that need not be present.
Oracle: torch's cross-entropy in float64.
"""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from lit_llm.kernels import cross_entropy as fused
from lit_llm.training.loss import nll_sum

CASES = [(5, 37, 1.0, None), (3, 64, 0.25, None), (4, 200, 1.0, 1.5), (2, 40, 2.0, 0.8)]     # tokens, vocabulary, factor, cap
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


def oracle(logits, targets, factor, cap):
    logits = logits.detach().double().requires_grad_()
    z = logits * factor
    z = cap * torch.tanh(z / cap) if cap is not None else z
    losses = F.cross_entropy(z, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def interpreted():
    """In a process of its own: Triton reads at import whether it interprets. 16 columns at a time make several passes."""
    from lit_llm.kernels import cross_entropy_triton as kernels

    kernels.BLOCK = 16
    torch.manual_seed(0)
    for rows, columns, factor, cap in CASES:
        logits, targets = 4 * torch.randn(rows, columns), torch.randint(columns, (rows,))
        want, wanted = oracle(logits, targets, factor, cap)
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
            delta = torch.empty(rows, columns, dtype=dtype)
            losses = kernels.differentiate(logits, targets[:, None], delta, factor, cap)
            assert (losses - want).abs().max() < 5e-6
            assert (delta - wanted).abs().max() < limit
    broken = torch.zeros(2, 20)
    broken[0, 3], broken[1, 17] = float("nan"), float("inf")
    assert kernels.differentiate(broken, torch.tensor([1, 1]), torch.empty(2, 20), 1.0, None).isnan().all()


def compiled():
    """For Ampere and Hopper, as a vocabulary of 128,256 takes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_llm.kernels import cross_entropy_triton as kernels

    for capped in (False, True):
        names = {"logits_ptr": "*fp32", "targets_ptr": "*i64", "losses_ptr": "*fp32", "delta_ptr": "*bf16",
                 "logits_stride": "i32", "delta_stride": "i32", "factor": "fp32", "cap": "fp32"}
        fixed = {"columns": 128256, "capped": capped, "size": kernels.BLOCK}
        source = ASTSource(fn=kernels._rows, signature=names | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.WARPS})
            assert made.asm["cubin"]


@needs_triton
@pytest.mark.parametrize("call", ["interpreted", "compiled"])
def test_the_kernel(call, tmp_path):
    env = os.environ | {"TRITON_INTERPRET": str(int(call == "interpreted")), "TRITON_CACHE_DIR": str(tmp_path)}
    code = f"from tests.training.test_kernels import {call}; {call}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("keys", [{}, {"bias": True}, {"factor": 2.0, "cap": 1.5}], ids=["plain", "bias", "capped"])
def test_logits_that_are_not_rounded(keys, monkeypatch):
    """CUDA's way through a slice, its products made by hand: the loss of bf16 states is then exact to float32."""
    monkeypatch.setattr(fused, "keeps_sums", lambda left: left.dtype == torch.bfloat16)
    monkeypatch.setattr(fused, "multiply", lambda left, right, out: out.copy_(left.to(out.dtype) @ right.to(out.dtype)))
    monkeypatch.setattr(fused, "_add_product", lambda total, left, right: total.add_(left.float() @ right.float()))
    monkeypatch.setitem(fused.SLICE_BYTES, "cpu", 2 * 37 * 16)
    torch.manual_seed(0)
    hidden = torch.randn(90, 12, dtype=torch.bfloat16, requires_grad=True)
    head = torch.nn.Linear(12, 37, bias="bias" in keys, dtype=torch.bfloat16)
    labels = torch.randint(37, (90,))
    settings = {name: value for name, value in keys.items() if name != "bias"}
    actual = nll_sum(hidden, labels, head, **settings).total
    bias = None if head.bias is None else head.bias.double()
    expected = oracle(F.linear(hidden.double(), head.weight.double(), bias)[:-1], labels[1:],
                      settings.get("factor", 1.0), settings.get("cap"))[0].sum()
    assert abs(actual.item() / expected.item() - 1) < 1e-6
    with torch.no_grad():
        assert abs(nll_sum(hidden, labels, head, **settings).total.item() / expected.item() - 1) < 1e-6
    leaves = [hidden, *head.parameters()]
    z = F.linear(*(leaf.double() for leaf in leaves))[:-1] * settings.get("factor", 1.0)
    cap = settings.get("cap")
    whole = F.cross_entropy(z if cap is None else cap * torch.tanh(z / cap), labels[1:], reduction="sum")
    for got, want in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert (got.double() - want.double()).norm() / want.double().norm() < 1e-2


def test_if_triton_does_not_work_torch_is_used_with_a_warning(caplog):
    """A CPU is such a place."""
    fused._kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert fused._kernel(torch.device("cpu")) is None
        assert fused._kernel(torch.device("cpu")) is None
    assert len([record for record in caplog.records if "Triton does not work here" in record.message]) == 1
