"""Properties of cut-cross-entropy and Liger that Triton's interpreter cannot show: that they run on a GPU, their memory, and when
they synchronise.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_llm.kernels import borrowed
from lit_llm.training.loss import nll_sum
from tests.gpu.test_loss_cuda import DEVICE, case, oracle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
KEYS = {"plain": {}, "scaled": {"factor": 0.25}, "capped": {"cap": 30.0}, "bias": {"bias": True}}


@pytest.fixture(params=list(borrowed.PACKAGES))
def name(request):
    pytest.importorskip(borrowed.MODULES[request.param].split(".")[0], reason="pip install 'lit_llm[kernels]'")
    return request.param


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_loss_and_gradients_are_those_of_float64(name, keys, autocast, frozen, record_property):
    """Tolerances are those of a vocabulary of 5,000: cut-cross-entropy's bf16 sums are less exact with a larger one."""
    if "bias" in keys and name == "cut_cross_entropy" and not borrowed._takes_bias(borrowed._module(name)):
        pytest.skip("25.1.1 knows no bias, and says so")
    hidden, labels, head = case(torch.float32 if autocast else torch.bfloat16, bias="bias" in keys)
    head.requires_grad_(not frozen)
    settings = {key: value for key, value in keys.items() if key != "bias"}
    leaves = [hidden] if frozen else [hidden, *head.parameters()]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        actual = nll_sum(hidden, labels, head, by=name, count=int((labels[1:] != -100).sum()), **settings).total
    expected = oracle(hidden, labels, head, **settings)
    got, want = torch.autograd.grad(3.0 * actual, leaves), torch.autograd.grad(3.0 * expected, leaves)
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))
    record_property("max_relative", worst)
    assert abs(actual.item() / expected.item() - 1) < 1e-3
    assert worst < 3e-2
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(got, leaves, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_memory_and_waits(name, frozen, record_property):
    """Vocabulary 32,000, 8,192 tokens: at most a third of the memory of all logits; only Liger's count synchronises."""
    head = nn.Linear(1024, 32000, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(not frozen)
    hidden = torch.randn(8192, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(32000, (8192,), device=DEVICE)

    def peak(step):
        hidden.grad = head.weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        step().backward()
        return torch.cuda.max_memory_allocated(DEVICE) - before

    def expected():
        return nll_sum(hidden, labels, head, by=name, count=8191).total

    expected().backward()                             # what is compiled and loaded once
    share = peak(expected) / peak(lambda: F.cross_entropy(head(hidden)[:-1].float(), labels[1:], reduction="sum"))
    record_property("share", share)
    assert share < 1 / 3
    torch.cuda.set_sync_debug_mode("error")
    try:
        if name == "liger":
            with pytest.raises(RuntimeError, match="synchroniz"):
                expected()
        else:
            (0.5 * expected()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
