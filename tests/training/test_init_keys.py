"""If this breaks: `model.init` accepts a key without effect and does not warn, or warns about a key that has one.

Oracle for keys with an effect: their description in transformers, and `test_keys.py`, which compares whole runs.
"""

import pytest

from lit_llm import CausalLMModule, Source, TextDataModule, Trainer
from lit_llm.training.checks import init_keys

FACTS = {"vocab_size": 1536, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
DEAD = [
    ("llama", {"pretraining_tp": 2}), ("llama", {"use_cache": False}), ("llama", {"dtype": "bfloat16"}),
    ("llama", {"problem_type": "regression"}), ("qwen2", {"sliding_window": 100}), ("qwen2", {"max_window_layers": 1}),
    ("gpt2", {"summary_use_proj": False}), ("gpt_neox", {"classifier_dropout": 0.5}),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "use_sliding_window": False, "sliding_window": 9}),
    ("mistral", {"chunk_size_feed_forward": 7}),
]
ALIVE = [
    ("llama", {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": True, "mlp_bias": True, "rope_theta": 5e5,
               "attention_dropout": 0.1, "rms_norm_eps": 1e-5, "initializer_range": 0.06, "tie_word_embeddings": True,
               "hidden_act": "gelu", "max_position_embeddings": 512, "eos_token_id": 5}),
    ("llama", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "pretraining_tp": 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
    ("gpt2", {"n_inner": 128, "attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.3, "layer_norm_epsilon": 1e-6,
              "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2,
                   "norm_topk_prob": True, "output_router_logits": True, "router_aux_loss_coef": 0.1}),
    ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 20.0,
                "final_logit_softcapping": 10.0, "sliding_window": 64, "num_key_value_heads": 2}),
    ("falcon", {"alibi": True, "multi_query": False, "hidden_dropout": 0.1, "parallel_attn": False}),
    ("mamba", {"state_size": 8, "residual_in_fp32": False, "time_step_rank": 4, "rescale_prenorm_residual": True}),
]


def sized(kind, keys):
    sizes = {"num_hidden_layers": 2} if kind in ("gpt2", "mamba", "falcon") else SIZES
    return {"model_type": kind} | sizes | ({"num_key_value_heads": 2} if "q" in kind or kind == "mistral" else {}) | keys


@pytest.mark.parametrize(("kind", "keys"), DEAD, ids=lambda value: value if isinstance(value, str) else min(value))
def test_a_key_that_nothing_reads_is_named(kind, keys):
    unread = set(init_keys.unread(sized(kind, keys), **FACTS))
    assert unread & keys.keys()
    assert unread <= keys.keys() | {"intermediate_size"}     # of dense layers, where all are experts


@pytest.mark.parametrize(("kind", "keys"), ALIVE, ids=[f"{at} {kind}" for at, (kind, _) in enumerate(ALIVE)])
def test_keys_that_act_are_not(kind, keys):
    assert set(init_keys.unread(sized(kind, keys), **FACTS)) <= {"intermediate_size"}


def test_a_run_says_so(tmp_path, tiny_tokenizer, caplog):
    (tmp_path / "text.txt").write_text("a few words\n" * 40)
    module = CausalLMModule(init=sized("llama", {"pretraining_tp": 2, "use_cache": False}))
    data = TextDataModule([Source(str(tmp_path / "text.txt"))], tokenizer=tiny_tokenizer, seq_len=32, packing="concat")
    Trainer(accelerator="cpu", max_steps=1, default_root_dir=str(tmp_path / "run"), enable_progress_bar=False).fit(
        module, datamodule=data)
    (message,) = [record.message for record in caplog.records if "model.init" in record.message]
    assert message == "model.init: llama does not use 'pretraining_tp', 'use_cache': no value of them changes this model"
