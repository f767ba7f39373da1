"""If this breaks: the loss on a GPU, which uses other kernels than on a CPU, is wrong or takes too much memory."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_llm.kernels import cross_entropy as fused
from lit_llm.training.loss import nll_sum

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda", 0)
TOKENS, WIDTH, VOCABULARY = 700, 64, 5000
KEYS = {"plain": {}, "bias": {"bias": True}, "scaled": {"factor": 0.25}, "capped": {"factor": 2.0, "cap": 5.0}}


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setitem(fused.SLICE_BYTES, "cuda", 2 * VOCABULARY * 128)


def case(dtype, bias=False):
    """Hidden states, labels with gaps, and a head; all numbers are exact in bfloat16, so products are exact."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, device=DEVICE).bfloat16().to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)
    labels[torch.rand(TOKENS, device=DEVICE) < 0.2] = -100
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, device=DEVICE).bfloat16().to(dtype)
    return hidden, labels, head


def oracle(hidden, labels, head, factor=1.0, cap=None):
    """Plain torch in float64, all logits at once."""
    bias = None if head.bias is None else head.bias.double()
    logits = F.linear(hidden.double(), head.weight.double(), bias)[:-1] * factor
    logits = cap * torch.tanh(logits / cap) if cap is not None else logits
    return F.cross_entropy(logits, labels[1:], reduction="sum")


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
def test_loss_and_gradients_are_those_of_float64(keys, autocast, frozen, record_property):
    """bf16 weights, and float32 weights under autocast; logits are not rounded, so the loss is float32's."""
    hidden, labels, head = case(torch.float32 if autocast else torch.bfloat16, bias="bias" in keys)
    head.requires_grad_(not frozen)
    settings = {name: value for name, value in keys.items() if name != "bias"}
    leaves = [hidden] if frozen else [hidden, *head.parameters()]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        actual = nll_sum(hidden, labels, head, count=int((labels[1:] != -100).sum()), **settings).total
    expected = oracle(hidden, labels, head, **settings)
    got, want = torch.autograd.grad(3.0 * actual, leaves), torch.autograd.grad(3.0 * expected, leaves)
    worst = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, want, strict=True))
    record_property("max_relative", worst)
    assert abs(actual.item() / expected.item() - 1) < 1e-5
    assert worst < 1e-2
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(got, leaves, strict=True))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        assert abs(nll_sum(hidden, labels, head, **settings).total.item() / expected.item() - 1) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.25, 5.0)])
def test_the_kernel_works_and_is_cross_entropy(factor, cap, dtype):
    kernel = fused._kernel(DEVICE)
    assert kernel is not None, "Triton does not work here; a warning says why, and the loss is slower"
    torch.manual_seed(0)
    logits = 5 * torch.randn(64, 32001, device=DEVICE)      # tokens that are not aligned, and end within a block
    targets = torch.randint(32001, (64,), device=DEVICE)
    gradient = torch.empty(64, 32001, device=DEVICE, dtype=dtype)
    losses = kernel(logits, targets[:, None], gradient, factor, cap)
    leaf = logits.double().requires_grad_()
    z = leaf * factor if cap is None else cap * torch.tanh(leaf * factor / cap)
    want = F.cross_entropy(z, targets, reduction="none")
    (wanted,) = torch.autograd.grad(want.sum(), leaf)
    assert (losses - want).abs().max() < 1e-4
    assert (gradient - wanted).norm() / wanted.norm() < (4e-3 if dtype == torch.bfloat16 else 1e-5)


def test_the_same_bits_every_time():
    """A resumed run could not be the same otherwise."""
    seen = []
    for _ in range(3):
        hidden, labels, head = case(torch.bfloat16)
        seen.append(torch.autograd.grad(nll_sum(hidden, labels, head).total, [hidden, head.weight]))
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, seen[0], strict=True))


def test_rows_that_learn_in_a_frozen_head():
    from peft.utils.other import TrainableTokensWrapper

    hidden, labels, inner = case(torch.bfloat16)
    labels[20:26] = torch.tensor([3, 30, 7, 7, 3, 5], device=DEVICE)
    head = TrainableTokensWrapper(inner.requires_grad_(False), "default", token_indices=[7, 3, 30])
    head.set_adapter("default")
    rows = head.token_adapter.trainable_tokens_delta["default"]
    with torch.no_grad():
        rows += 1.0
    whole = nn.Module()
    whole.weight, whole.bias = inner.weight.double().index_copy(0, torch.tensor([7, 3, 30], device=DEVICE), rows.double()), None
    actual, expected = nll_sum(hidden, labels, head).total, oracle(hidden, labels, whole)
    assert abs(actual.item() / expected.item() - 1) < 1e-5
    for got, want in zip(torch.autograd.grad(actual, [hidden, rows]), torch.autograd.grad(expected, [hidden, rows]), strict=True):
        assert (got.double() - want.double()).norm() / want.double().norm() < 1e-2


@pytest.mark.parametrize("frozen", [False, True])
def test_a_large_vocabulary_takes_a_third_of_the_memory_of_all_logits(frozen, monkeypatch, record_property):
    """Vocabulary 128,256, 8,192 tokens: additional peak memory of forward and backward."""
    monkeypatch.undo()
    if torch.cuda.mem_get_info(DEVICE)[0] < 30 * 2**30:
        pytest.skip("all logits need some 25 GiB")
    head = nn.Linear(1024, 128256, bias=False, device=DEVICE, dtype=torch.bfloat16).requires_grad_(not frozen)
    hidden = torch.randn(8192, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(128256, (8192,), device=DEVICE)

    def peak(step):
        hidden.grad = head.weight.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        before = torch.cuda.memory_allocated(DEVICE)
        step().backward()
        return torch.cuda.max_memory_allocated(DEVICE) - before

    nll_sum(hidden[:8], labels[:8], head).total.backward()      # what is loaded once
    actual = peak(lambda: nll_sum(hidden, labels, head, count=8191).total)
    expected = peak(lambda: F.cross_entropy(head(hidden)[:-1].float(), labels[1:], reduction="sum"))
    record_property("share", actual / expected)
    assert actual < expected / 3, f"{actual / 2**30:.2f} of {expected / 2**30:.2f} GiB"
