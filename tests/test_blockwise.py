"""If this breaks: on a CPU a token reads what it must not see, or its gradient is another one than its loss says."""

import pytest
import torch

from lit_llm import blockwise


def states(count, groups, length, width, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(count, groups, length, width), (count, length, width), (count, length, width)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def oracle(query, key, value, scale, window=None):
    """All scores at once, in float64."""
    length = key.shape[1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (back < 0) | (back >= (window or length))
    scores = torch.einsum("ngqd,nkd->ngqk", query.double(), key.double()) * scale
    return torch.einsum("ngqk,nkd->ngqd", scores.masked_fill(hidden, float("-inf")).softmax(-1), value.double())


def with_gradients(attend, inputs, upstream):
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("groups", "window"), [(1, None), (3, None), (2, 1), (2, 50), (1, 100), (1, 1000)])
def test_values_and_gradients_are_those_of_all_scores_at_once(length, groups, window):
    inputs = states(2, groups, length, 8)
    upstream = torch.randn(2, groups, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = with_gradients(lambda *each: blockwise.causal(*each, scale=0.4, window=window), inputs, upstream)
    want = with_gradients(lambda *each: oracle(*each, 0.4, window), inputs, upstream)
    for ours, exact in zip(got, want, strict=True):
        assert (ours - exact).abs().max() < 1e-12


def eager(query, key, value, scale):
    """As transformers writes it: products in half precision, a softmax in float32."""
    length = key.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key[:, None].transpose(-1, -2) * scale).masked_fill(hidden, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value[:, None]


@pytest.mark.parametrize("length", [40, 128, 400])
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_in_bfloat16_it_is_no_less_exact_than_transformers_own(length, sharp, record_property):
    inputs = states(4, 2, length, 32, torch.bfloat16)
    upstream = torch.randn(4, 2, length, 32, generator=torch.Generator().manual_seed(1))
    scale = sharp * 32**-0.5
    exact, ours, theirs = (with_gradients(lambda *each, run=run: run(*each, scale), inputs, upstream) for run in (
        oracle, lambda *each: blockwise.causal(*each[:3], scale=each[3]), eager))
    for name, want, mine, other in zip(["out", "query", "key", "value"], exact, ours, theirs, strict=True):
        far, as_far = ((each.double() - want.double()).norm() / want.double().norm() for each in (mine, other))
        record_property(name, (far.item(), as_far.item()))
        assert far < 0.015
        assert far < 1.1 * as_far


def test_no_scores_of_a_whole_document_exist():
    """Of 2,048 tokens, all scores of one head would be 32 times as many numbers as the largest tensor here."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                self.numel = max(self.numel, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    query, key, value = states(1, 1, 2048, 4, torch.float32)
    with Largest() as largest:
        blockwise.causal(query, key, value, scale=0.5).sum().backward()
    assert largest.numel <= blockwise.BLOCK * 2048


def test_what_is_kept_does_not_grow_with_the_square_of_a_length():
    """Masks stay for the next call: for a length and all shorter ones, a few times one block's scores."""
    import gc

    def tensors():
        gc.collect()
        return [each for each in gc.get_objects() if type(each) is torch.Tensor]

    before = tensors()
    for length in (4096, 3000, 1111):
        query, key, value = states(1, 2, length, 4, torch.bfloat16)
        blockwise.causal(query, key, value, scale=0.5)
    del query, key, value
    old = {id(each) for each in before}
    kept = [each for each in tensors() if id(each) not in old and each.dtype == torch.bfloat16]
    assert sum(each.numel() for each in kept) < 6 * 2 * blockwise.BLOCK * 4096


def test_torch_can_trace_it():
    query, key, value = states(2, 2, 130, 8, torch.float32)
    value = value.detach()[..., :5].clone().requires_grad_()        # values of latent attention are narrower than keys
    torch.library.opcheck(torch.ops.lit_llm.causal_attention.default, (query, key, value, 0.5, 130),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
