"""Describe rotary positions in llama.cpp's terms: base, scaling, and factors of each frequency."""

import math
from typing import Any

import numpy as np

Typed = tuple[str, Any]


def head_dim(config: Any) -> int:
    """Values of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def parameters(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """The rotary parameters of the model, or of one kind of its layers (Gemma-3 has two)."""
    own = dict(config.rope_parameters or {})
    return dict(own[layers]) if layers in own else own


def kind(config: Any) -> str:
    """Type of rotary scaling, in transformers' words; `yarn (not truncated)` for a variant that others lack."""
    own = parameters(config)
    name = str(own.get("rope_type", "default"))
    partial = float(own.get("partial_rotary_factor", 1.0))
    if partial != 1.0 and config.model_type != "phi3":
        return f"{name} with partial_rotary_factor {partial}"
    return "yarn (not truncated)" if name == "yarn" and own.get("truncate", True) is False else name


def describe(config: Any) -> tuple[dict[str, Typed], dict[str, np.ndarray]]:
    """Metadata keys (without the architecture's name) and factor tensors of a config that `families.py` accepted.

    The frequency of pair i is base^(-2i/n) / factor_i; a file stores the factors where no key describes them.
    """
    own, name = parameters(config), kind(config)
    rotated = int(head_dim(config) * float(own.get("partial_rotary_factor", 1.0)))
    keys: dict[str, Typed] = {"rope.dimension_count": ("UINT32", rotated),
                              "rope.freq_base": ("FLOAT32", float(own["rope_theta"]))}
    if "sliding_attention" in (config.rope_parameters or {}):
        keys["rope.freq_base_swa"] = ("FLOAT32", float(parameters(config, "sliding_attention")["rope_theta"]))
    if name == "linear":
        return keys | {"rope.scaling.type": ("STRING", "linear"),
                       "rope.scaling.factor": ("FLOAT32", float(own["factor"]))}, {}
    if name == "yarn":
        return keys | _yarn(config, own), {}
    if name == "llama3":
        return keys, {"rope_freqs.weight": _llama3(own, rotated)}
    if name == "longrope":
        return keys | _longrope(config, own), {
            f"rope_factors_{which}.weight": np.asarray(own[f"{which}_factor"], np.float32)
            for which in ("long", "short")}
    return keys, {}


def _original(config: Any, own: dict[str, Any]) -> int:
    """Context length before scaling."""
    return int(own.get("original_max_position_embeddings")
               or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings)


def _yarn(config: Any, own: dict[str, Any]) -> dict[str, Typed]:
    """YaRN: llama.cpp multiplies by 0.1 ln(factor) + 1 itself, so the key has what is left of the attention factor."""
    factor = float(own["factor"])
    usual = _magnitude(factor, 1.0)
    attention = own.get("attention_factor")
    if attention is None:
        scale, all_dims = own.get("mscale"), own.get("mscale_all_dim")
        attention = _magnitude(factor, scale) / _magnitude(factor, all_dims) if scale and all_dims else usual
    return {"rope.scaling.type": ("STRING", "yarn"), "rope.scaling.factor": ("FLOAT32", factor),
            "rope.scaling.original_context_length": ("UINT32", _original(config, own)),
            "rope.scaling.attn_factor": ("FLOAT32", float(attention) / usual),
            "rope.scaling.yarn_beta_fast": ("FLOAT32", float(own.get("beta_fast") or 32)),
            "rope.scaling.yarn_beta_slow": ("FLOAT32", float(own.get("beta_slow") or 1))}


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(config: Any, own: dict[str, Any]) -> dict[str, Typed]:
    """LongRoPE: short factors up to the original context, long ones beyond; llama.cpp decides by its cache's size."""
    original = _original(config, own)
    factor = float(own.get("factor") or config.max_position_embeddings / original)
    attention = own.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {"rope.scaling.type": ("STRING", "longrope"), "rope.scaling.attn_factor": ("FLOAT32", float(attention)),
            "rope.scaling.original_context_length": ("UINT32", original)}


def _llama3(own: dict[str, Any], rotated: int) -> np.ndarray:
    """Factors of Llama 3: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    factor, low, high = float(own["factor"]), float(own["low_freq_factor"]), float(own["high_freq_factor"])
    original = float(own["original_max_position_embeddings"])
    wavelengths = 2 * math.pi * float(own["rope_theta"]) ** (np.arange(0, rotated, 2) / rotated)
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelengths < original / high, 1.0,
                    np.where(wavelengths > original / low, factor, between)).astype(np.float32)
