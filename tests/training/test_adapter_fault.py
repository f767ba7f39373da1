"""If this breaks: a PEFT method that cannot compute on a layer causes a long traceback that names neither."""

import pytest
import torch
from test_cli import call, place  # noqa: F401
from torch import nn

from lit_llm.errors import InputError
from lit_llm.models.adapters.adapter import wrap_peft
from lit_llm.models.load import load_causal_lm
from lit_llm.training.checks.adapter_fault import explained

OLORA = {"class_path": "LoraConfig", "init_args": {"r": 4, "init_lora_weights": "olora", "target_modules": ["c_attn"]}}


def test_a_method_that_cannot_compute_on_a_layer_is_reported_in_a_line(place, tiny_model):  # noqa: F811
    code, _, err = call("fit", "--config", "ok.yaml", "--model.base", tiny_model("gpt2"), "--model.lora", "null",
                        "--model.peft", '{class_path: LoraConfig, init_args: {r: 4, init_lora_weights: olora}}')
    assert code == 2, err
    message = err[err.index("error: "):]
    assert "Traceback" not in err
    for word in ("model.peft: LoraConfig with init_lora_weights: olora cannot", "transformer.h.0.", "(Conv1D)"):
        assert word in message, message
    assert not (place / "run").exists()


@pytest.mark.parametrize("spec", [
    {"class_path": "TrainableTokensConfig", "init_args": {"target_modules": ["wte"]}},      # of no tokens
    {"class_path": "OSFConfig", "init_args": {"target_modules": ["c_attn"]}}])              # knows no Conv1D
def test_a_method_that_has_nothing_to_train_is_refused(spec, tiny_model):
    """Its backward pass would fail, because no weight gets a gradient."""
    with pytest.raises(InputError, match="has nothing to train"):
        wrap_peft(load_causal_lm(tiny_model("gpt2")), spec)


def test_other_exceptions_stay_what_they_are(tiny_model):
    """Those of the base's own layers, of callers, and of memory that runs out; and no adapter, no translation."""
    model, ids = wrap_peft(load_causal_lm(tiny_model("gpt2")), OLORA), torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match=r"h\.0\.attn\.c_attn \(Conv1D\)"), explained(model, OLORA):
        model(ids)
    with pytest.raises(RuntimeError), explained(model, None):
        model(ids)
    with pytest.raises(KeyError), explained(model, OLORA):
        raise KeyError("ours")
    good = OLORA | {"init_args": OLORA["init_args"] | {"init_lora_weights": True}}
    model = wrap_peft(load_causal_lm(tiny_model("gpt2")), good)

    def fails(words):
        def forward(*_):
            raise RuntimeError(words)
        return forward

    layer = model.get_base_model().transformer.h[0].attn.c_attn
    layer.base_layer.forward = fails("of the base")
    with pytest.raises(RuntimeError, match="of the base"), explained(model, good):
        model(ids)
    del layer.base_layer.forward
    layer.lora_A["default"] = nn.Linear(5, 4, bias=False)
    with pytest.raises(InputError, match="c_attn"), explained(model, good):
        model(ids)
