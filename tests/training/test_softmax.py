"""If this breaks: on a GPU another loss and gradient is trained than on a CPU, or a GPU without a compiler trains nothing.

The Triton kernel runs here under Triton's interpreter, on CPU tensors, and is compiled for GPUs that need not be there.
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

from lit_llm.training import softmax

CASES = [(5, 37, 1.0, None), (3, 64, 0.25, None), (4, 200, 1.0, 1.5), (2, 40, 2.0, 0.8)]     # rows, columns, factor, cap
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


def oracle(logits, targets, factor, cap):
    logits = logits.detach().double().requires_grad_()
    z = logits * factor
    z = cap * torch.tanh(z / cap) if cap is not None else z
    losses = F.cross_entropy(z, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def worst(run, dtype):
    """The largest absolute errors of a function's losses and gradients over all cases."""
    torch.manual_seed(0)
    errors = []
    for rows, columns, factor, cap in CASES:
        logits, targets = 4 * torch.randn(rows, columns), torch.randint(columns, (rows,))
        want = oracle(logits, targets, factor, cap)
        got = run(logits, targets, factor, cap, dtype)
        assert got[0].dtype == torch.float32
        assert got[1].dtype == dtype
        errors.append([float((ours - theirs).abs().max()) for ours, theirs in zip(got, want, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_losses_and_gradient_are_those_of_cross_entropy(dtype, limit):
    losses, gradient = worst(softmax.losses_and_gradient, dtype)
    assert losses < 5e-6
    assert gradient < limit


def interpreted():
    """In a process of its own: Triton reads at import whether it interprets. 16 columns at a time make several passes."""
    from lit_llm.training import kernels

    kernels.BLOCK = 16
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 8e-3)):
        losses, gradient = worst(kernels.losses_and_gradient, dtype)
        assert losses < 5e-6, losses
        assert gradient < limit, gradient
    broken = torch.zeros(2, 20)
    broken[0, 3], broken[1, 17] = float("nan"), float("inf")
    assert kernels.losses_and_gradient(broken, torch.tensor([1, 1]), 1.0, None, torch.float32)[0].isnan().all()


def compiled():
    """For Ampere and Hopper, as a vocabulary of 128,256 takes it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lit_llm.training import kernels

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
    code = f"from tests.training.test_softmax import {call}; {call}()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_where_triton_does_not_work_torch_is_taken_and_it_is_said(caplog):
    """A CPU is such a place."""
    softmax._kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert softmax._kernel(torch.device("cpu")) is None
        assert softmax._kernel(torch.device("cpu")) is None
    assert len([record for record in caplog.records if "Triton does not work here" in record.message]) == 1
