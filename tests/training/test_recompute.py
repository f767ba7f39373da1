"""If this breaks: gradient checkpointing changes gradients or saves the wrong activations, or `auto` chooses wrongly."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lit_llm.kernels import attention
from lit_llm.models import recompute
from lit_llm.models.adapters.adapter import wrap_peft
from lit_llm.models.adapters.peft_method import LoRA
from lit_llm.models.anatomy import backbone
from lit_llm.models.load import init_causal_lm

WIDE = dict(vocab_size=100, hidden_size=64, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2)
DOCUMENTS = torch.tensor([0, 40, 64], dtype=torch.int32)


class Count(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def tiny(kind="llama", layers=2, **more):
    torch.manual_seed(0)
    model = init_causal_lm(WIDE | {"model_type": kind, "num_hidden_layers": layers} | more, attention=attention.NAME)
    return model.train()


def forward(model, tokens=64, borders=DOCUMENTS):
    ids = torch.arange(tokens)[None] % 97
    return backbone(model)(input_ids=ids, position_ids=ids, attention_mask=None, use_cache=False, cu_seqlens=borders,
                           max_seqlen=int(borders.diff().max())).last_hidden_state


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_the_same_and_only_the_cheap_is_computed_again(lora):
    grads, calls = {}, {}
    for way in ("none", "selective", "full"):
        model = tiny()
        whole = wrap_peft(model, LoRA(r=2).as_peft()) if lora else model
        recompute.apply(model, way)
        with Count() as count:
            forward(whole).square().sum().backward()
        grads[way] = {name: weight.grad for name, weight in whole.named_parameters() if weight.grad is not None}
        calls[way] = count.calls
    assert len(grads["none"]) == (28 if lora else 20)
    for way in ("selective", "full"):
        assert grads[way].keys() == grads["none"].keys()
        assert all(torch.equal(grads[way][name], gradient) for name, gradient in grads["none"].items())
    products, activation = "aten.mm.default", "aten.silu.default"
    again = calls["selective"][products] - calls["none"][products]
    assert again in ((12, 14) if lora else (0,))    # second products of adapters, of which a layer's last may be spared
    assert calls["full"][products] - calls["none"][products] > (20 if lora else 10)
    assert calls["selective"][activation] == calls["full"][activation] == 2 * calls["none"][activation]
    attention_calls = [{name: many for name, many in calls[way].items() if "attention" in name and "backward" not in name}
                       for way in calls]
    assert attention_calls[0] == attention_calls[1] != attention_calls[2]
