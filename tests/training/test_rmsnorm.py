"""If this breaks: a model trained on a CPU gets wrong gradients from its norms."""

import copy

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lit_llm.kernels import rmsnorm

SHAPES = [(1, 40, 96), (2, 7, 3, 16), (1, 1, 5)]


def inputs(shape, dtype, offset=0.7):
    draw = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(shape, generator=draw, dtype=torch.float64) * 3 + offset for _ in range(2))
    weight = torch.randn(shape[-1], generator=draw, dtype=torch.float64) + 1
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), upstream.to(dtype)


def exact(x, weight, eps):
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def with_gradients(norm, x, weight, upstream):
    out = norm(x, weight)
    return [out.detach(), *torch.autograd.grad(out, [x, weight], upstream.to(out.dtype))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_the_formula(shape, dtype, most, record_property):
    arguments = inputs(shape, dtype)
    got = with_gradients(lambda x, weight: rmsnorm.norm(x, weight, 1e-3), *arguments)
    want = with_gradients(lambda x, weight: exact(x, weight, 1e-3), *arguments)
    for name, actual, right in zip(("out", "x", "weight"), got, want, strict=True):
        assert actual.dtype == dtype
        far = ((actual.double() - right.double()).norm() / right.double().norm()).item()
        record_property(name, far)
        assert far < most


def test_autograd_agrees_where_it_looks_closely():
    x, weight, _ = inputs((2, 3, 8), torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: rmsnorm.norm(x, weight, 1e-2), (x, weight))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm, Olmo2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quickened_layer_answers_as_before(kind, dtype):
    x, weight, upstream = inputs((1, 30, 32), dtype)
    layer = kind(32, eps=1e-5).to(dtype)
    layer.weight.data.copy_(weight.data)
    before = [layer(x).detach(), *torch.autograd.grad(layer(x), [x, layer.weight], upstream)]
    assert rmsnorm.use_fast_norms(torch.nn.Sequential(layer)) == 1
    for quick in (layer, copy.deepcopy(layer)):     # as PEFT copies a layer that is trained beside its adapters
        assert "Norm" in layer(x).grad_fn.name()
        after = [quick(x).detach(), *torch.autograd.grad(quick(x), [x, quick.weight], upstream)]
        for old, new in zip(before, after, strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 1e-2
            assert (old.double() - new.double()).norm() < tolerance * old.double().norm()
    copied = copy.deepcopy(layer)
    copied.weight.data.zero_()
    assert (copied(x) == 0).all()
    assert (layer(x) != 0).any()


def test_another_formula_stays_as_it_is():
    """Gemma adds 1 to its weights; a layer of that name may do anything."""
    class OddRMSNorm(torch.nn.Module):
        def __init__(self, size, eps=1e-6):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), eps

        def forward(self, x):
            return x * self.weight

    class BareRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x

    layers = Gemma3RMSNorm(8), OddRMSNorm(8), BareRMSNorm()
    assert rmsnorm.use_fast_norms(torch.nn.Sequential(*layers)) == 0
    assert all("forward" not in vars(layer) for layer in layers)


def test_a_weight_of_another_type_is_left_to_the_layer():
    layer = LlamaRMSNorm(8)
    x = torch.randn(3, 8).bfloat16()
    before = layer(x)
    rmsnorm.use_fast_norms(torch.nn.Sequential(layer))
    assert layer(x).dtype == before.dtype == torch.float32
    assert torch.equal(layer(x), before)
