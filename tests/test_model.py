"""If this breaks: adapters miss layers or start off the base, an export is another model than the one that was trained,
or a broken folder ends in a traceback.
"""

import json
import shutil

import pytest
import torch
from torch import nn

from lit_llm import model as models
from lit_llm.errors import InputError
from lit_llm.model import LoRA, init_causal_lm, load_causal_lm, merge, save_adapter, save_causal_lm, wrap_peft

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
    layers = [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]
    adapted = {name.removeprefix("base_model.model.") for name in layers}
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
    "LoraConfig": {"r": 4, "use_dora": True}, "LoHaConfig": {"r": 4}, "IA3Config": {},
    "VeraConfig": {"r": 4}, "OFTConfig": {"r": 0, "oft_block_size": 8}, "AdaLoraConfig": {"total_step": 100},
    "RandLoraConfig": {"r": 4},
    "TrainableTokensConfig": {"token_indices": [3, 5]}, "VBLoRAConfig": {"vector_length": 8, "num_vectors": 16},
    "AdaptionPromptConfig": {"adapter_layers": 1, "adapter_len": 3},
    "PromptTuningConfig": {"num_virtual_tokens": 3}, "PrefixTuningConfig": {"num_virtual_tokens": 3},
}


NEARLY = {"VBLoRAConfig": 0.1}                      # starts close to the base, not at it
UNMERGED = ("PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig")


@pytest.mark.parametrize("name", METHODS)
def test_any_peft_method(tiny_model, tmp_path, name):
    """Starts at the base, learns, is saved as PEFT saves it, keeps packed documents apart, merges or says it cannot."""
    from peft import PeftModel

    spec = {"class_path": f"peft.{name}", "init_args": METHODS[name]}
    base = load_causal_lm(tiny_model("llama"))
    before = logits(base)
    model = wrap_peft(base, spec)
    prompt = models.learns_prompt(model)
    assert prompt == models.learns_prompt_by(spec) == (name in UNMERGED[:2])
    assert 0 < models.count_parameters(model).trainable < models.count_parameters(model).total
    if not prompt:
        assert (logits(model) - before).abs().max() < NEARLY.get(name, 1e-5)
    disturb(model)
    want = logits(model)
    assert not torch.allclose(want, before, atol=1e-3)
    state = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    save_adapter(model, tmp_path, state, "the/base")
    again = PeftModel.from_pretrained(load_causal_lm(tiny_model("llama")), str(tmp_path))
    assert (logits(again) - want).abs().max() < 1e-5
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    if not prompt:
        packed = models.load_adapter(load_causal_lm(tiny_model("llama"), attention="lit_varlen"), tmp_path).eval()
        assert (two_in_a_row(packed) - torch.cat([want[0], want[0]])).abs().max() < 1e-5
    if name in UNMERGED:
        with pytest.raises(InputError, match="cannot be merged"):
            merge(model)
    else:
        merged = merge(model)
        assert not models.is_peft(merged)
        assert (logits(merged) - want).abs().max() < 1e-4


def two_in_a_row(model):
    with torch.no_grad():
        length = IDS.shape[1]
        return models.head(model)(models.backbone(model)(
            input_ids=IDS.repeat(1, 2), position_ids=torch.arange(length).repeat(2)[None], attention_mask=None,
            use_cache=False, cu_seqlens=torch.tensor([0, length, 2 * length], dtype=torch.int32),
            max_seqlen=length).last_hidden_state[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_the_adapter(tiny_model, kind):
    model = wrap_peft(load_causal_lm(tiny_model(kind)), LoRA(r=4).as_peft())
    disturb(model)
    want = logits(model)
    merged = merge(model)
    assert (logits(merged) - want).abs().max() < 1e-4
    assert merge(merged) is merged
    if kind == "qwen3":
        assert models.head(merged).weight is merged.get_input_embeddings().weight


@pytest.mark.parametrize(("spec", "said"), [
    ({"class_path": "LoarConfig"}, "Did you mean 'LoraConfig'?"),
    ({"class_path": "peft.LoraConfig", "init_arg": {}}, "'init_arg' is not known"),
    ({"init_args": {"r": 3}}, "give class_path"),
    ({"class_path": "peft.LoraModel"}, "not known"),
    ({"class_path": "os.system"}, "not known"),
    ({"class_path": "LoraConfig", "init_args": {"rank": 3}}, "LoraConfig has no key 'rank'"),
    ({"class_path": "LoraConfig", "init_args": {"lora_alhpa": 3}}, "Did you mean 'lora_alpha'?"),
    ({"class_path": "LoraConfig", "init_args": {"target_modules": ["c_attn"]}}, "linear layers here: down_proj, "),
    ({"class_path": "LoraConfig", "init_args": {"r": 0}}, "model.peft"),
    ({"class_path": "LoraConfig", "init_args": {"r": "many"}}, "model.peft"),
    ({"class_path": "PromptTuningConfig"}, "model.peft"),
    ({"class_path": "XLoraConfig"}, "not known"),
    ({"class_path": "AdaLoraConfig"}, "total_step"),
])
def test_a_wrong_adapter_is_a_user_error(tiny_model, spec, said):
    with pytest.raises(InputError) as caught:
        wrap_peft(load_causal_lm(tiny_model("llama")), spec)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_one_way_to_ask_for_adapters():
    long = {"class_path": "LoHaConfig"}
    assert models.spec_of(None, None) is None
    assert models.spec_of(long, None) == long
    assert models.spec_of(None, LoRA(r=3, alpha=5))["init_args"]["lora_alpha"] == 5
    with pytest.raises(InputError, match="keep one"):
        models.spec_of(long, LoRA())


# ---- build, load, save -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_model(tiny_model, tmp_path, kind):
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_causal_lm(tiny_model(kind), attention="lit_varlen")
    disturb(model)
    save_causal_lm(model, tmp_path / "whole", stop_ids=(2, 0), pad_id=0)
    state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    models.save_weights(model, tmp_path / "weights", state)
    model.set_attn_implementation("sdpa")
    for folder in ("whole", "weights"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), logits(model)), folder
        assert again.config._attn_implementation == "sdpa"
        assert again.config.use_cache
    settings = GenerationConfig.from_pretrained(tmp_path / "whole")
    assert settings.eos_token_id == [2, 0]
    assert settings.pad_token_id == 0
    assert not list((tmp_path / "whole").glob("*.bin"))


def test_saved_in_half_precision(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    save_causal_lm(load_causal_lm(tiny_model("llama")), tmp_path, stop_ids=(2,), pad_id=0, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_causal_lm(str(tmp_path)).dtype == torch.float32


def test_a_saved_generation_config_stops_generate(tiny_model, tmp_path):
    """transformers' own generate stops at any of the stop ids that were saved."""
    from transformers import AutoModelForCausalLM

    model = load_causal_lm(tiny_model("llama"))
    first = logits(model)[0, -1].argmax().item()
    save_causal_lm(model, tmp_path, stop_ids=(1, first), pad_id=0)
    out = AutoModelForCausalLM.from_pretrained(tmp_path).generate(IDS, max_new_tokens=9, attention_mask=IDS * 0 + 1)
    assert out[0, IDS.shape[1]:].tolist() == [first]


@pytest.mark.parametrize(("init", "said"), [
    ({"model_type": "lama"}, "Did you mean 'llama'?"),
    ({}, "unknown model_type 'None'"),
    ({"model_type": "t5"}, "unknown model_type 't5'"),
    ({"model_type": "llama", "hiden_size": 3}, "llama has no key 'hiden_size'. Did you mean 'hidden_size'?"),
    ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "model.init"),
    ({"model_type": "llama", "hidden_size": "wide"}, "model.init"),
    ({"model_type": "llama", "hidden_act": "relo", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
      "num_hidden_layers": 1, "num_key_value_heads": 1}, "model.init"),
])
def test_a_wrong_architecture_is_a_user_error(init, said):
    with pytest.raises(InputError) as caught:
        init_causal_lm(init, vocab_size=64)
    assert said in str(caught.value)


@pytest.mark.parametrize("keys", [
    {"rope_theta": 5000.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}])
def test_any_key_of_the_architecture_is_taken(keys):
    model = init_causal_lm({"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
                            "num_hidden_layers": 1, **keys}, vocab_size=64, dtype=torch.float64)
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.dtype == torch.float64


def broken(folder, how):
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "gone":
        shutil.rmtree(folder)
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "unknown architecture":
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    elif how == "code of its own":
        remote = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
        (folder / "config.json").write_text(json.dumps({"auto_map": remote}))
        (folder / "evil.py").write_text("raise SystemExit('ran')")
    elif how == "no weights":
        weights.unlink()
    elif how == "pickled weights":
        from safetensors.torch import load_file

        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "empty weights":
        weights.write_bytes(b"")
    elif how == "a tensor is missing":
        from safetensors.torch import load_file, save_file

        state = load_file(weights)
        del state["model.layers.1.mlp.up_proj.weight"]
        save_file(state, weights, metadata={"format": "pt"})
    elif how == "other shapes":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    elif how == "impossible config":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


@pytest.mark.parametrize("how", [
    "gone", "no config", "config is no JSON", "unknown architecture", "code of its own", "no weights", "pickled weights",
    "cut weights", "empty weights", "a tensor is missing", "other shapes", "impossible config"])
def test_a_broken_folder_is_a_user_error(tiny_model, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    broken(folder, how)
    with pytest.raises(InputError) as caught:
        load_causal_lm(str(folder))
    assert "model.base" in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(InputError, match="HF_ENDPOINT"):
        load_causal_lm("nobody/nothing")


def test_what_stands_behind_the_head():
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 vocab_size=320, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for model in (CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25)),
                  GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=8.0)),
                  Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=8, final_logit_softcapping=0.5))):
        model.eval()
        with torch.no_grad():
            out = models.head(model)(models.backbone(model)(input_ids=IDS).last_hidden_state)
        factor, cap = models.logit_adjustment(model)
        out = out * factor
        out = torch.tanh(out / cap) * cap if cap else out
        assert (factor, cap) != (1.0, None)
        assert (out - logits(model)).abs().max() < 1e-6
