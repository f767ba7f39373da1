"""If this breaks: adapters miss layers or start off the base, an export is another model than the one that was trained,
or a broken folder ends in a traceback.
"""

import json

import pytest
import torch
from torch import nn

from lit_llm import model as models
from lit_llm.errors import InputError
from lit_llm.model import LoRA, load_causal_lm, merge, save_adapter, wrap_peft

IDS = torch.tensor([[5, 9, 200, 31, 31, 7, 300, 12]])
KINDS = ["llama", "qwen3", "gpt2"]


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[:, -IDS.shape[1]:]


def disturb(model, seed=0):
    """Make adapters do something: a step of training in a random direction."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draw)


def is_linear(layer):
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


# ---- adapters --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_lora_adapts_every_linear_layer_but_the_head_and_starts_at_the_base(tiny_model, kind):
    base = load_causal_lm(tiny_model(kind))
    linears = {name for name, layer in base.named_modules() if is_linear(layer) and name != "lm_head"}
    before = logits(base)
    model = wrap_peft(base, LoRA(r=4).as_peft())
    adapted = {name.removeprefix("base_model.model.") for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    assert adapted == linears
    assert len(linears) == {"llama": 14, "qwen3": 14, "gpt2": 8}[kind]
    assert torch.equal(logits(model), before)
    for name, weight in model.named_parameters():
        assert weight.requires_grad == ("lora_" in name), name
        if "lora_B" in name:
            assert (weight == 0).all()
        if "lora_A" in name:
            assert weight.abs().sum() > 0
    count = models.count_parameters(model)
    assert count.trainable == sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    assert count.total == sum(w.numel() for w in model.parameters())
    assert f"{count.trainable:,} of {count.total:,}" in str(count)


def test_tied_weights_are_counted_once(tiny_model):
    model = load_causal_lm(tiny_model("qwen3"))
    assert models.head(model).weight is model.get_input_embeddings().weight
    assert models.count_parameters(model).total == sum({id(w): w.numel() for w in model.parameters()}.values())


METHODS = {
    "LoraConfig": {"r": 4, "use_dora": True}, "LoHaConfig": {"r": 4}, "LoKrConfig": {"r": 4}, "IA3Config": {},
    "VeraConfig": {"r": 4}, "OFTConfig": {"r": 0, "oft_block_size": 8}, "AdaLoraConfig": {"total_step": 100},
    "FourierFTConfig": {"n_frequency": 10, "init_weights": True}, "BOFTConfig": {"boft_block_size": 4},
    "HRAConfig": {"r": 4}, "LNTuningConfig": {}, "MissConfig": {"r": 4}, "RandLoraConfig": {"r": 4},
    "ShiraConfig": {"r": 2}, "C3AConfig": {"block_size": 4, "init_weights": True}, "RoadConfig": {"group_size": 8},
    "TrainableTokensConfig": {"token_indices": [3, 5]}, "VBLoRAConfig": {"vector_length": 8, "num_vectors": 16},
    "AdamssConfig": {}, "BeftConfig": {}, "DeftConfig": {}, "DeloraConfig": {}, "FrodConfig": {}, "GloraConfig": {}, "GraloraConfig": {}, "HiraConfig": {}, "KasaConfig": {}, "LilyConfig":{}, "OSFConfig": {}, "PeanutConfig":{},"PolyConfig":{},"PsoftConfig":{},"PveraConfig":{},"SupertuningConfig":{},"TinyLoraConfig":{},"UniLoraConfig":{},"VeloraConfig":{},"WaveFTConfig":{},"BdLoraConfig":{},"EvaConfig":{},"LoraGAConfig":{},"MontecloraConfig":{},"ShadowConfig":{}, "XLoraConfig":{},"ArrowConfig":{},"CPTConfig":{},"CartridgeConfig":{},"AdaptionPromptConfig":{"adapter_layers":1,"adapter_len":3},"MultitaskPromptTuningConfig":{"num_virtual_tokens":3},
    "PromptTuningConfig": {"num_virtual_tokens": 3}, "PrefixTuningConfig": {"num_virtual_tokens": 3},
    "PromptEncoderConfig": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("name", METHODS)
def test_any_peft_method(tiny_model, tmp_path, name):
    from peft import PeftModel

    base = load_causal_lm(tiny_model("llama"))
    before = logits(base)
    model = wrap_peft(base, {"class_path": f"peft.{name}", "init_args": METHODS[name]})
    prompt = models.learns_prompt(model)
    assert 0 < models.count_parameters(model).trainable < models.count_parameters(model).total
    if not prompt:
        assert (logits(model) - before).abs().max() < 1e-5, "does not start at the base"
    disturb(model)
    want = logits(model)
    assert not torch.allclose(want, before, atol=1e-3)
    state = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, tmp_path, state, "the/base")
    again = PeftModel.from_pretrained(load_causal_lm(tiny_model("llama")), str(tmp_path))
    assert (logits(again) - want).abs().max() < 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    if prompt:
        with pytest.raises(InputError, match="cannot be merged"):
            merge(model)
    else:
        merged = merge(model)
        assert not models.is_peft(merged)
        assert (logits(merged) - want).abs().max() < 2e-4
