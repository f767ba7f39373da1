"""If this breaks: an untrusted adapter takes all memory, causes a traceback, or silently gives a model of nan."""

import json

import pytest
import torch

from lit_llm.errors import InputError
from lit_llm.models.adapters import adapter, starting
from lit_llm.models.adapters.peft_method import peft_config
from lit_llm.models.load import load_causal_lm

METHODS = {"LoraConfig": {"r": 2}, "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
           "VeraConfig": {"r": 4}, "PromptEncoderConfig": {"num_virtual_tokens": 3}, "LoHaConfig": {"r": 2}}
VALUES = [-1, 10**9, 10**30, 2.5, float("nan"), float("inf"), -1e308, "x", [1], {"a": {"b": []}}, None]
NUMBERS = {"LoraConfig": ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "trainable_token_indices",
                          "layers_to_transform"),
           "IA3Config": ("target_modules", "feedforward_modules"), "VeraConfig": ("r", "d_initial", "projection_prng_key"),
           "PromptEncoderConfig": ("num_virtual_tokens", "encoder_hidden_size", "token_dim", "encoder_num_layers"),
           "LoHaConfig": ("r", "alpha", "rank_dropout")}


@pytest.mark.parametrize("method", METHODS)
def test_any_value_gives_a_model_of_numbers_or_a_user_error(method, tiny_model, tmp_path):
    model = adapter.wrap_peft(load_causal_lm(tiny_model("llama")), {"class_path": method, "init_args": METHODS[method]})
    state = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    adapter.save_adapter(model, tmp_path, state, "base")
    file = tmp_path / "adapter_config.json"
    right, refused = json.loads(file.read_text()), 0
    for key in NUMBERS[method]:
        for value in VALUES:
            file.write_text(json.dumps(right | {key: value}))
            try:
                made = starting.load(load_causal_lm(tiny_model("llama")), tmp_path)
            except InputError:
                refused += 1
                continue
            assert all(torch.isfinite(weight).all() for weight in made.parameters()), (key, value)
            assert sum(weight.numel() for weight in made.parameters()) < 50_000_000, (key, value)
    assert refused > len(NUMBERS[method])


def test_an_adapter_is_not_larger_than_its_base_and_its_file(tiny_model, tmp_path):
    """Each number is valid separately."""
    model = adapter.wrap_peft(load_causal_lm(tiny_model("llama")), {"class_path": "LoraConfig", "init_args": {"r": 2}})
    adapter.save_adapter(model, tmp_path, {name: weight.detach() for name, weight in model.named_parameters()
                                           if weight.requires_grad}, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 1 << 20}))
    with pytest.raises(InputError, match="parameters, more than its weight files can contain"):
        adapter.load_adapter(load_causal_lm(tiny_model("llama")), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**12, -1e308])
def test_the_same_in_the_config_of_a_run(value):
    with pytest.raises(InputError, match=r"model\.peft: lora_alpha is "):
        peft_config({"class_path": "LoraConfig", "init_args": {"lora_alpha": value}})
