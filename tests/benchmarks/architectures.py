"""Compare loss and gradient with plain transformers for every causal LM of transformers that can be built small.

For each `model_type` a small config is made and a `CausalLMModule` is built as `fit` does it. Its weights are replaced by
random ones. The result of its `sums` for a packed batch, in training and in evaluation, is compared with transformers' own
forward pass of each document, in float64 if the model supports it. (Weights, documents and comparison are independent of
`training/checks/proof.py`.) Prints the chosen way, the relative difference of the loss, and the largest relative difference
of the gradient: |difference| / |gradient| over all weights.

    python -m tests.benchmarks.architectures                     # all, some minutes
    python -m tests.benchmarks.architectures --only llama gpt2
"""

import argparse
import copy
import logging
import os
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
warnings.filterwarnings("ignore")

LENGTHS = ((31, 9, 3, 14), (17, 23, 8))
TOLERANCE = {"64-true": 1e-6, "32-true": 1e-4}
LLAMA_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Keys without which the default config makes no causal language model, or none that is small.
SPECIAL = {
    **{kind: {"is_decoder": True} for kind in (
        "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
        "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod")},
    "bamba": {"num_hidden_layers": 2, "attn_layer_indices": [1]},
    "blenderbot": {"encoder_layers": 2, "decoder_layers": 2},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}, "deepseek_v2": {"num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16}, "hunyuan_v1_moe": {"head_dim": 16}, "ministral": {"head_dim": 16},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": LLAMA_ROPE, "sliding_attention": LLAMA_ROPE}},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 6},
    "xlm": {"causal": True},
}
VARIANTS = {
    "llama, biases, 1 kv head": {"model_type": "llama", "attention_bias": True, "mlp_bias": True,
                                 "num_attention_heads": 4, "num_key_value_heads": 1},
    "llama, tied, wide heads": {"model_type": "llama", "tie_word_embeddings": True, "head_dim": 24},
    "llama, yarn": {"model_type": "llama", "rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}},
    "llama, dynamic": {"model_type": "llama", "max_position_embeddings": 16, "rope_parameters": {
        "rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "mistral, short window": {"model_type": "mistral", "sliding_window": 3},
    "qwen2, window above some layers": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
                                        "max_window_layers": 1},
    "granite, multipliers": {"model_type": "granite", "logits_scaling": 7.0, "embedding_multiplier": 12.0,
                             "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    "granitemoe, multipliers": {"model_type": "granitemoe", "logits_scaling": 6.0, "embedding_multiplier": 12.0,
                                "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    "cohere, scale and norms": {"model_type": "cohere", "logit_scale": 0.25, "use_qk_norm": True},
    "hyperclovax, factors": {"model_type": "hyperclovax", "logits_scaling": 0.125, "embedding_multiplier": 10.0,
                             "residual_multiplier": 0.5, "attention_multiplier": 0.01, "use_post_norm": True},
    "falcon_h1, head multiplier": {"model_type": "falcon_h1", "lm_head_multiplier": 0.039, "embedding_multiplier": 5.6},
    "phi3, half rotary": {"model_type": "phi3", "partial_rotary_factor": 0.5},
    "stablelm, parallel": {"model_type": "stablelm", "use_parallel_residual": True, "use_qkv_bias": True,
                           "qk_layernorm": True},
    "gemma2, caps": {"model_type": "gemma2", "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0},
    "gemma2, one cap": {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": 2.0},
    "gpt2, scaled by layer": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True,
                              "reorder_and_upcast_attn": True},
    "gpt_neox, sequential": {"model_type": "gpt_neox", "use_parallel_residual": False},
    "falcon, old decoder": {"model_type": "falcon", "multi_query": False, "alibi": True},
    "olmo, clipped": {"model_type": "olmo", "clip_qkv": 0.5},
    "smollm3, rope left out": {"model_type": "smollm3", "no_rope_layers": [1, 0], "num_hidden_layers": 2},
    "qwen3_moe, every second": {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "norm_topk_prob": True},
    "deepseek_v3, no query rank": {"model_type": "deepseek_v3", "q_lora_rank": None},
}


def tiny(keys):
    """A small config by the keys of `model.init`: what they name stays as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from lit_llm.models import miniature

    kind, more = keys["model_type"], {key: value for key, value in keys.items() if key != "model_type"}
    config, last = AutoConfig.for_model(kind, **more), "no config"
    for small in miniature.candidates(config, whole=False):
        for key, value in more.items():
            if not isinstance(value, dict) or "rope" in key:
                setattr(small, key, value)
        try:
            with torch.device("meta"):
                built = AutoModelForCausalLM.from_config(copy.deepcopy(small))
            if sum(weight.numel() for weight in built.parameters()) > 60e6:
                raise ValueError("too large")
            with torch.no_grad():
                AutoModelForCausalLM.from_config(copy.deepcopy(small))(input_ids=torch.arange(7)[None])
            return small
        except Exception as error:
            last = f"{type(error).__name__}: {error}"
    raise ValueError(last)


def batch_of(words, seed):
    """Two packed sequences of documents that begin with unsupervised tokens, and padding."""
    from lit_llm.data.rows.loader import batch_of

    draw = np.random.default_rng(seed)
    rows = [[(draw.choice(words, length), np.arange(length) >= draw.integers(0, 4)) for length in lengths]
            for lengths in LENGTHS]
    return batch_of(rows, seq_len=60, pad_id=int(words[0]), token_bytes=np.ones((2, int(words.max()) + 1), np.int64))


def randomize(model, seed):
    """Other numbers in every weight than its architecture begins with."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=draw, dtype=torch.float64).to(weight.dtype)
            weight.nan_to_num_().add_(noise, alpha=0.15 if weight.dim() < 2 else 0.7 / max(1, weight.shape[-1]) ** 0.5)


def reference_nll(model, batch):
    """Sum of NLL by plain transformers."""
    ids, labels, total = batch["input_ids"].view(-1), batch["labels"].view(-1), 0.0
    for start, stop in pairwise(batch["cu_seqlens"].tolist()):
        if (labels[start:stop] != -100).any():
            logits = model(input_ids=ids[None, start:stop]).logits[0, :-1]
            total = total + F.cross_entropy(logits, labels[start + 1:stop], ignore_index=-100, reduction="sum")
    return total


def module_of(config, precision):
    """A `CausalLMModule` with its model, as `fit` makes it."""
    from transformers import AutoConfig

    from lit_llm import CausalLMModule, Trainer

    kind = config.model_type
    config_keys = {*AutoConfig.for_model(kind, **SPECIAL.get(kind, {})).to_dict(), "head_dim"}
    keys = {key: value for key, value in config.to_dict().items() if key in config_keys and key not in
            ("transformers_version", "architectures", "dtype", "use_cache")}
    module = CausalLMModule(init=keys)
    module.trainer = Trainer(accelerator="cpu", devices=1, precision=precision, logger=False, strategy="auto",
                             enable_checkpointing=False, enable_progress_bar=False)
    tokenizer = SimpleNamespace(vocab_size=32, bos_id=None, eos_id=1, pad_id=0)
    module.trainer.datamodule = SimpleNamespace(tokenizer=tokenizer, seq_len=60)
    module._tokenizer_facts = dict                  # the config has all values that a tokenizer would give
    module.configure_model()
    return module


def difference(config, precision, seed):
    """(way, relative difference of the loss in training and evaluation, that of the gradient)."""
    from transformers import AutoModelForCausalLM

    from lit_llm.training.checks import proof

    module = module_of(config, precision)
    randomize(module.model, seed)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=next(module.model.parameters()).dtype)
    plain.load_state_dict(module.model.state_dict())
    if precision == "64-true":                      # the product of all experts at once knows no float64
        for model in (plain, module.model):
            model.set_experts_implementation("eager")
    special = {value for key, value in config.to_dict().items() if isinstance(value, int) and "token_i" in key}
    rows = min(len(plain.get_input_embeddings().weight), config.get_text_config(decoder=True).vocab_size)
    batch = batch_of(np.array([word for word in range(rows) if word not in special]), seed)
    with proof.Wide() if precision == "64-true" else nullcontext():
        return (module.way, *compared(module, plain, batch))


def compared(module, plain, batch):
    """Relative difference of the loss in training and evaluation, and that of the gradient."""
    plain.train()
    right = reference_nll(plain, batch)
    right.backward()
    module.train()
    nll = module.sums(batch).total
    nll.backward()
    worst, grads = abs(float(nll) - float(right)) / abs(float(right)), 0.0
    mine = {name: weight.grad for name, weight in module.model.named_parameters()}
    whole = float(torch.stack([weight.grad.norm() for weight in plain.parameters() if weight.grad is not None]).norm())
    for name, weight in plain.named_parameters():
        wanted = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        got = mine[name] if mine[name] is not None else torch.zeros_like(weight)
        grads = max(grads, float((got - wanted).norm()) / (float(wanted.norm()) + 1e-4 * whole))
    module.eval()
    plain.eval()
    with torch.no_grad():
        right, nll = float(reference_nll(plain, batch)), float(module.sums(batch).total)
    return max(worst, abs(nll - right) / abs(right)), grads


def examine(keys, seed):
    """(outcome, a line about it)."""
    from lit_llm import InputError

    try:
        config = tiny(keys)
    except Exception as error:
        return "not built", " ".join(f"{type(error).__name__}: {error}".split())[:150]
    error = None
    for precision, tolerance in TOLERANCE.items():
        try:
            way, loss, gradient = difference(config, precision, seed)
        except InputError as refused:
            return "refused", " ".join(str(refused).split())[:200]
        except Exception as failed:                 # parts that support float32 only
            error = failed
            continue
        how = f"{'packed' if way.packed else 'alone':6} {'own logits' if way.own_logits else 'our loss':10}"
        same = loss <= tolerance and gradient <= 10 * tolerance
        why = way.why_unpacked or way.why_own_logits
        return (f"{'packed' if way.packed else 'alone'}, {'own logits' if way.own_logits else 'our loss'}"
                if same else "DIFFERENT"), f"{how} loss {loss:.0e} gradient {gradient:.0e} {precision}  {why[:90]}"
    return "CRASH", " ".join(f"{type(error).__name__}: {error}".split())[:200]


def main():
    from transformers import logging as chatter
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    chatter.set_verbosity_error()
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--variants", action="store_true", help="known architectures with unusual keys, not all kinds")
    args = parser.parse_args()
    cases = VARIANTS if args.variants else {
        kind: {"model_type": kind} | SPECIAL.get(kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    counts = {}
    for name, keys in cases.items():
        if args.only and name not in args.only:
            continue
        began = time.perf_counter()
        outcome, line = examine(keys, args.seed)
        counts.setdefault(outcome, []).append(name)
        print(f"{name:24} {outcome:20} {line}  {time.perf_counter() - began:.1f} s", flush=True)
    for outcome, names in sorted(counts.items()):
        print(f"{len(names):4} {outcome}" + ("" if "our loss" in outcome else ": " + ", ".join(names)))
    return int(bool({"DIFFERENT", "CRASH"} & counts.keys()))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
