"""If this breaks: a served model computes with other weights than its files hold, or the server needs twice the memory.

Oracle: the same model with plain layers of torch.
"""

import copy
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_llm.inference.engine import Engine
from lit_llm.kernels import packed_linear, switch
from lit_llm.system.private import torch as private_torch
from tests.benchmarks.architectures import tiny

pytestmark = pytest.mark.skipif(not private_torch.has_fused_linear(), reason="this build of torch has no oneDNN")


def build(dtype=torch.float32, **keys):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny({"model_type": "llama", **keys}), dtype=dtype).eval()


class HeadOnly(nn.Module):
    """A model of a single layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.layer(nn.functional.one_hot(input_ids, self.layer.in_features).float()))


def linears(model):
    return [layer for layer in model.modules() if type(layer) is nn.Linear]


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"model_type": "qwen3_moe"}],
                         ids=["llama", "tied head", "biases", "router"])
@torch.no_grad()
def test_packed_layers_compute_the_same_for_any_number_of_rows(keys):
    plain = build(**keys)
    for layer in linears(plain):
        if layer.bias is not None:
            layer.bias.normal_()
    packed = copy.deepcopy(plain)
    assert packed_linear.pack(packed) == len(linears(plain))
    assert all("forward" in vars(layer) for layer in linears(packed))
    for rows in (1, 7, 32, 100):
        ids = torch.randint(0, plain.config.vocab_size, (1, rows))
        want = plain(input_ids=ids).logits
        assert (packed(input_ids=ids).logits - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
def test_the_memory_does_not_grow_with_every_new_number_of_rows():
    """oneDNN keeps about the size of the output for each: 270 MB here if every number of a step's tokens were its own."""
    layer = nn.Linear(512, 1408)
    rows = torch.randn(288, 512)
    want = layer(rows)
    assert packed_linear.pack(HeadOnly(layer)) == 1
    resident = []
    for first in (288, 1):
        for count in range(first, 289):
            assert torch.allclose(layer(rows[:count]), want[:count], atol=1e-4)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    assert resident[1] - resident[0] < 100


def test_plain_weights_are_given_up_and_never_read_by_mistake():
    model = build()
    packed_linear.pack(model)
    for layer in linears(model):
        assert layer.weight.untyped_storage().nbytes() == 4
        assert layer.weight.isnan().all()
    assert model.get_input_embeddings().weight.isfinite().all()


@torch.no_grad()
def test_a_model_that_reads_a_weight_itself_keeps_plain_weights():
    class Reading(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **inputs):
            out = self.model(**inputs)
            out.logits = out.logits + self.model.model.layers[0].mlp.up_proj.weight.sum()
            return out

    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert packed_linear.pack(Reading(model)) == 0
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_an_engine_packs_what_it_loads_unless_own_kernels_are_off(tiny_model):
    engine = Engine.load(tiny_model("llama"))
    assert any("forward" in vars(layer) for layer in linears(engine.model))
    with switch.using("plain"):
        plain = Engine.load(tiny_model("llama"))
    assert not any("forward" in vars(layer) for layer in linears(plain.model))
