"""If this breaks: an exported model differs from the trained one, or a broken folder causes a traceback."""

import json
import shutil

import pytest
import torch

from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.models import load as models
from lit_llm.models.load import init_causal_lm, load_causal_lm, save_causal_lm
from tests.tiny_models import IDS, KINDS, disturb, logits


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_a_saved_model_is_the_model(tiny_model, tmp_path, kind):
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = load_causal_lm(tiny_model(kind), attention="lit_varlen")
    disturb(model)
    save_causal_lm(model, tmp_path / "whole", stop_ids=(2, 0), pad_id=0)
    state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    models.save_weights(model, tmp_path / "weights", state)
    plain = "eager" if kind == "gemma2" else "sdpa"      # as transformers chooses for the model
    model.set_attn_implementation(plain)
    for folder in ("whole", "weights"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), logits(model)), folder
        assert again.config._attn_implementation == plain
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


@pytest.mark.parametrize(("init", "message"), [
    ({"model_type": "lama"}, "Did you mean 'llama'?"),
    ({}, "unknown model_type 'None'"),
    ({"model_type": "t5"}, "unknown model_type 't5'"),
    ({"model_type": "llama", "hiden_size": 3}, "llama has no key 'hiden_size'. Did you mean 'hidden_size'?"),
    ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "model.init"),
    ({"model_type": "llama", "hidden_size": "wide"}, "model.init"),
    ({"model_type": "llama", "hidden_act": "relo", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
      "num_hidden_layers": 1, "num_key_value_heads": 1}, "model.init"),
])
def test_a_wrong_architecture_is_a_user_error(init, message):
    with pytest.raises(InputError) as caught:
        init_causal_lm(init, vocab_size=64)
    assert message in str(caught.value)


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
    elif how == "shapes of its weights do not match":
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 72}))
    elif how == "impossible config":
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


@pytest.mark.parametrize("how", [
    "gone", "no config", "config is no JSON", "unknown architecture", "code of its own", "no weights", "pickled weights",
    "cut weights", "empty weights", "a tensor is missing", "shapes of its weights do not match", "impossible config"])
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


def test_transforms_after_the_head():
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
            out = anatomy.head(model)(anatomy.backbone(model)(input_ids=IDS).last_hidden_state)
        factor, cap = anatomy.logit_adjustment(model)
        out = out * factor
        out = torch.tanh(out / cap) * cap if cap else out
        assert (factor, cap) != (1.0, None)
        assert (out - logits(model)).abs().max() < 1e-6


def test_tied_weights_are_counted_once(tiny_model):
    model = load_causal_lm(tiny_model("qwen3"))
    assert anatomy.head(model).weight is model.get_input_embeddings().weight
    assert anatomy.count_parameters(model).total == sum({id(w): w.numel() for w in model.parameters()}.values())


def test_encoders_are_refused():
    """Their loss would fall to 0, because they attend to the tokens to be predicted."""
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    with pytest.raises(InputError, match="encoder"):
        init_causal_lm({"model_type": "bert"} | tiny, vocab_size=64)
    init_causal_lm({"model_type": "bert", "is_decoder": True} | tiny, vocab_size=64)
