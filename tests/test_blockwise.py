"""If this breaks: on a CPU a token attends to tokens that it must not see, or gradients do not belong to the loss."""

from itertools import pairwise

import pytest
import torch

from lit_llm.kernels import blockwise


def states(shared, groups, tokens, width, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(shared * groups, tokens, width), (shared, tokens, width), (shared, tokens, width)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def oracle(query, key, value, borders, scale, window=None):
    """All scores of the sequence at once, in float64."""
    tokens, groups = key.shape[1], len(query) // len(key)
    document = torch.searchsorted(torch.tensor(borders), torch.arange(tokens), right=True)
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    hidden = (back < 0) | (back >= (window or tokens)) | (document[:, None] != document)
    key, value = (tensor.double().repeat_interleave(groups, 0) for tensor in (key, value))
    scores = (query.double() @ key.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


def with_gradients(attend, inputs, upstream):
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


ROWS = [[0, 1], [0, 63], [0, 64], [0, 65], [0, 200],
        [0, 5, 5, 12, 17, 18], [0, 100, 110, 205, 330, 340], [0, 70, 140, 210], [0, 65, 66, 200, 265]]


@pytest.mark.parametrize("borders", ROWS, ids=str)
@pytest.mark.parametrize(("groups", "window"), [(1, None), (3, None), (2, 1), (2, 50), (1, 100), (1, 1000)])
def test_values_and_gradients_are_those_of_all_scores_at_once(borders, groups, window):
    inputs = states(2, groups, borders[-1], 8)
    upstream = torch.randn(borders[-1], 2 * groups, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = with_gradients(lambda *tensors: blockwise.causal(*tensors, borders, scale=0.4, window=window), inputs, upstream)
    want = with_gradients(lambda *tensors: oracle(*tensors, borders, 0.4, window), inputs, upstream)
    for actual, exact in zip(got, want, strict=True):
        assert (actual - exact).abs().max() < 1e-12


def test_documents_of_like_length_are_stacked():
    assert blockwise.stacks((0, 70, 140, 210)) == (None, None, None, [(3, 70)])         # no movement
    order, back, repeated, shapes = blockwise.stacks((0, 100, 110, 207, 208))
    assert shapes == [(2, 100), (2, 10)]
    assert order[back].tolist() == list(range(208))
    assert len(order) - len(repeated) == 208


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 3, 5, 4), (4, 128, 32, 200)])
def test_a_product_does_not_read_the_memory_that_it_is_written_to(dtype, shape):
    """Torch documents this for beta=0; scores rely on it."""
    count, rows, inner, columns = shape
    left, right = torch.ones(count, rows, inner, dtype=dtype), torch.ones(count, inner, columns, dtype=dtype)
    out = torch.full((count, rows, columns), float("nan"), dtype=dtype)
    assert (out.baddbmm_(left, right.transpose(1, 2).contiguous().transpose(1, 2), beta=0, alpha=0.5) == inner / 2).all()


def eager(query, key, value, borders, scale):
    """As transformers writes it: products in half precision, a softmax in float32."""
    groups, out = len(query) // len(key), []
    for start, stop in pairwise(borders):
        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        queries = query[:, start:stop]
        keys, values = (tensor[:, start:stop].repeat_interleave(groups, 0) for tensor in (key, value))
        scores = (queries @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
        out.append(scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ values)
    return torch.cat(out, 1).transpose(0, 1)


@pytest.mark.parametrize("borders", [[0, 40, 80, 119], [0, 128], [0, 400]], ids=str)
@pytest.mark.parametrize("sharp", [1.0, 4.0])
def test_in_bfloat16_it_is_no_less_exact_than_transformers_own(borders, sharp, record_property):
    inputs = states(4, 2, borders[-1], 32, torch.bfloat16)
    upstream = torch.randn(borders[-1], 8, 32, generator=torch.Generator().manual_seed(1))
    scale = sharp * 32**-0.5
    exact, own, reference = (with_gradients(lambda *tensors, run=run: run(*tensors, borders, scale), inputs, upstream) for run in (
        oracle, lambda *tensors: blockwise.causal(*tensors[:4], scale=tensors[4]), eager))
    for name, want, mine, other in zip(["out", "query", "key", "value"], exact, own, reference, strict=True):
        far, as_far = ((result.double() - want.double()).norm() / want.double().norm() for result in (mine, other))
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

    with Largest() as largest:
        blockwise.causal(*states(1, 1, 2048, 4, torch.float32), [0, 2048], scale=0.5).sum().backward()
    assert largest.numel <= blockwise.BLOCK * 2048


@pytest.mark.parametrize("window", [None, 1000])
def test_what_is_kept_does_not_grow_with_the_square_of_a_length(window):
    """Masks stay for the next call: fewer numbers than one block has scores."""
    import gc

    def tensors():
        gc.collect()
        return [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor]

    before = tensors()
    for length in (4096, 3000, 1111):
        blockwise.causal(*states(1, 2, length, 4, torch.bfloat16), [0, length], scale=0.5, window=window)
    old = {id(tensor) for tensor in before}
    saved = [tensor for tensor in tensors() if id(tensor) not in old and tensor.dtype == torch.bfloat16]
    assert sum(tensor.numel() for tensor in saved) < 2 * blockwise.BLOCK * 4096


def test_torch_can_trace_it():
    query, key, value = states(2, 2, 130, 8, torch.float32)
    value = value.detach()[..., :5].clone().requires_grad_()        # values of latent attention are narrower than keys
    torch.library.opcheck(torch.ops.lit_llm.causal_attention.default, (query, key, value, [0, 60, 130], 0.5, 130),
                          test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))
