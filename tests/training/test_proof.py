"""If this breaks: a model is trained with another loss than transformers defines for it, with exit code 0 and no warning."""

import json

import numpy as np
import pytest
import torch

from lit_llm import CausalLMModule, InputError
from lit_llm.kernels import rmsnorm
from lit_llm.training import forward
from lit_llm.training.checks import proof, proof_cache
from tests.benchmarks.architectures import VARIANTS, difference, tiny

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS = {                                           # (packed, own logits)
    "llama": (SMALL | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 12}, (True, False)),
    "hyperclovax": (SMALL | VARIANTS["hyperclovax, factors"], (True, False)),           # its factor multiplies
    "modernbert-decoder": ({"model_type": "modernbert-decoder"}, (True, True)),         # a layer before the matrix
    "falcon_h1": ({"model_type": "falcon_h1", "lm_head_multiplier": 0.04, "embedding_multiplier": 5.0}, (False, False)),
    "llama4_text": ({"model_type": "llama4_text"}, (False, False)),                     # chunks, positions left out
    "mamba": ({"model_type": "mamba"}, (False, False)),
    "mixtral": (SMALL | {"model_type": "mixtral", "num_local_experts": 4, "sliding_window": 3}, (True, False)),
    "diffllama": ({"model_type": "diffllama"}, (True, False)),                          # norms without a weight
    "gemma2": (SMALL | VARIANTS["gemma2, caps"], (False, False)),
    "prophetnet": ({"model_type": "prophetnet"}, (False, True)),                        # two streams in its backbone
}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_transformers(kind):
    """Through the module that `fit` builds, in float64, with weights and documents that the proof did not use."""
    keys, (packed, own_logits) = KINDS[kind]
    way, loss, gradient = difference(tiny(keys), "64-true", seed=5)
    assert loss < 1e-6
    assert gradient < 1e-5
    assert (way.packed, way.own_logits) == (packed, own_logits), way
    assert bool(way.why_unpacked) == (not packed)
    assert bool(way.why_own_logits) == own_logits


def test_a_large_config_is_judged_by_a_small_model_of_it():
    """The names of architectures do not matter: an unknown multiplier after the head is detected, and a window."""
    llama = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
             "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
    assert proof.way_of(None, llama) == forward.Way(keep=True)
    hyperclovax = VARIANTS["hyperclovax, factors"] | {"hidden_size": 4096, "num_hidden_layers": 32}
    assert proof.way_of(None, hyperclovax).factor == 0.125
    phi = {"model_type": "phi3", "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0,
        "short_factor": [1.0] * 48, "long_factor": [1.0 + n for n in range(48)]}, "max_position_embeddings": 131072}
    assert proof.way_of(None, phi, seq_len=4096).packed
    assert not proof.way_of(None, phi, seq_len=8192).packed     # the longest document of a sequence would change the angles of all others


def test_an_additional_transform_is_detected(monkeypatch):
    """Norms that round otherwise, an attention that looks too far, a head with another factor: each is left out."""
    keys = SMALL | {"model_type": "llama"}
    config = tiny(keys)
    like = proof.models.skeleton(None, keys)
    assert proof.prove(like, config).fast_norms     # and the class of its norms is known as a plain one
    with monkeypatch.context() as patch:
        patch.setattr(rmsnorm, "norm", lambda x, weight, eps: x * weight * (x.square().mean(-1, True) + 1e-3).rsqrt())
        assert proof.prove(like, config) == forward.Way(keep=True, fast_norms=False)
    with monkeypatch.context() as patch:
        real = forward.nll_sum
        patch.setattr(forward, "nll_sum", lambda *args, factor, **more: real(*args, factor=1.01 * factor, **more))
        assert proof.prove(like, config).own_logits
    with monkeypatch.context() as patch:
        blockwise = proof.attention.blockwise
        causal = blockwise.causal
        patch.setattr(blockwise, "causal", lambda *args, **more: causal(*args[:3], (0, args[0].shape[1]), **more))
        way = proof.prove(like, config)
        assert not way.packed
        assert "loss would be" in way.why_unpacked


def test_an_answer_is_kept_and_a_damaged_one_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path))
    proof_cache.in_memory.cache_clear()
    way, (file,) = proof.way_of(None, SMALL | {"model_type": "qwen2"}), (tmp_path / "proofs").iterdir()
    whole = json.loads(file.read_text())
    monkeypatch.setattr(proof, "prove", lambda *_: pytest.fail("asked again"))
    proof_cache.in_memory.cache_clear()
    assert proof.way_of(None, SMALL | {"model_type": "qwen2"}) == way
    monkeypatch.setattr(proof, "prove", lambda *_: forward.Way(factor=3.0))
    for damaged in ("", "{", "[]", json.dumps(whole | {"key": "0"}), json.dumps(whole | {"way": {"packed": 1}}),
                    json.dumps(whole | {"way": whole["way"] | {"factor": "2"}})):
        proof_cache.in_memory.cache_clear()
        file.write_text(damaged)
        assert proof.way_of(None, SMALL | {"model_type": "qwen2"}).factor == 3.0, damaged


def test_nothing_of_a_run_is_drawn_by_the_proof():
    proof_cache.in_memory.cache_clear()
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    proof.way_of(None, SMALL | {"model_type": "olmo"})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_encoders_are_detected_by_their_attention():
    bert = {"model_type": "bert", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 64}
    with pytest.raises(InputError, match="encoder"):
        CausalLMModule(init=bert).choose_attention({})
    assert CausalLMModule(init=bert | {"is_decoder": True}).choose_attention({}) in (None, "lit_varlen")


def test_adapters_are_in_the_models_own_logits():
    """Packed, by the model's whole forward pass, as PEFT's model gives them for each document by itself."""
    from transformers import AutoModelForCausalLM

    from lit_llm import LoRA
    from lit_llm.kernels import attention
    from lit_llm.models.adapters.adapter import wrap_peft
    from tests.tiny_models import disturb

    attention.register()
    config = tiny({"model_type": "modernbert-decoder"})
    inner = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model = wrap_peft(inner, LoRA(r=2, target_modules="all-linear").as_peft())
    disturb(model)
    batch = proof.documents(inner, 1)
    sums = forward.nll(model.eval(), batch, forward.Choices(forward.Way(own_logits=True, keep=True)))
    inner.set_attn_implementation("eager")
    right = sum_of(model, batch)
    assert sums.total.item() == pytest.approx(right.item(), rel=1e-5)
    with model.disable_adapter():
        assert abs(sum_of(model, batch) - right) > 1e-2


def sum_of(model, batch):
    from tests.benchmarks.architectures import reference_nll

    with torch.no_grad():
        return reference_nll(model, batch)
