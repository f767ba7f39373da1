"""Describe an architecture in llama.cpp's metadata, or refuse what llama.cpp would compute differently.

The keys are those that llama.cpp reads. What its code fixes (attention scale, layers without rotation, activation) is
compared with the config, because a file cannot state it. `rope.py` describes rotary positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lit_llm.errors import InputError
from lit_llm.exports.gguf import rope

Typed = tuple[str, Any]                             # a GGUF value type, such as UINT32, and the value
Metadata = dict[str, Typed]


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp computes the models of one `model_type`.

    Args:
        arch: Name of the architecture in llama.cpp.
        permuted: Whether the rows of query and key weights are stored in pairs (a rotation of neighbours).
        shifted_norms: Whether norms multiply by 1 + weight, which is stored as such.
        square: Whether heads x head_dim must be the hidden size.
        biases: Linear layers that may have a bias, as their names end.
        scaling: Types of rotary scaling that llama.cpp computes.
        check: Further conditions on the config; returns a reason, or an empty text.
    """

    arch: str
    permuted: bool = False
    shifted_norms: bool = False
    square: bool = False
    biases: tuple[str, ...] = ()
    scaling: tuple[str, ...] = ("default", "dynamic", "linear", "yarn")
    activation: str = "silu"
    check: Callable[[Any], str] = lambda config: ""


def _gemma3(config: Any) -> str:
    scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    if config.query_pre_attn_scalar != scale:
        return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp computes with {scale}"
    if getattr(config, "use_bidirectional_attention", False):
        return "use_bidirectional_attention is set"
    return "attn_logit_softcapping is set" if config.attn_logit_softcapping else ""


def _smollm3(config: Any) -> str:
    wanted = [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]
    return "" if list(config.no_rope_layers) == wanted else (
        "no_rope_layers differs from every fourth layer, which llama.cpp leaves without rotation")


QKV = ("q_proj", "k_proj", "v_proj")
LLAMA = Family("llama", permuted=True, biases=(*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"),
               scaling=("default", "dynamic", "linear", "yarn", "llama3", "longrope"))
FAMILIES = {
    "llama": LLAMA, "mistral": LLAMA,
    "qwen2": Family("qwen2", square=True, biases=QKV),
    "qwen3": Family("qwen3", biases=QKV),
    "gemma3_text": Family("gemma3", shifted_norms=True, activation="gelu_pytorch_tanh",
                          scaling=("default", "linear"), check=_gemma3),
    "phi3": Family("phi3", square=True, scaling=("default", "longrope")),
    "smollm3": Family("smollm3", permuted=True, biases=QKV, check=_smollm3),
}


@dataclass(frozen=True, slots=True)
class Description:
    """A model in llama.cpp's terms.

    Args:
        family: Its family.
        metadata: Keys and values of the file, without the tokenizer's.
        tensors: Tensors that the file has and the model computes: factors of rotary frequencies, float32.
        notes: Where the file is limited, for the user.
    """

    family: Family
    metadata: Metadata
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def family_of(config: Any, where: str) -> Family:
    """The family of a model.

    Raises:
        InputError: llama.cpp has no such architecture, or computes this config differently; the error says what.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(f"GGUF files are written for {', '.join(sorted(FAMILIES))}, and this model is a "
                         f"{config.model_type}", where=where, fix="export it with --format transformers")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    heads, wide = config.num_attention_heads, config.hidden_size
    reasons = [
        f"the activation is {activation}, and llama.cpp computes {family.activation}"
        if activation != family.activation else "",
        f"{heads} heads of {rope.head_dim(config)} values differ from the hidden size {wide}"
        if family.square and heads * rope.head_dim(config) != wide else "",
        f"rotary scaling is {rope.kind(config)}, and llama.cpp computes {', '.join(family.scaling)}"
        if rope.kind(config) not in family.scaling else "",
        family.check(config)]
    if reason := next(filter(None, reasons), ""):
        raise InputError(f"llama.cpp cannot compute this {config.model_type} model: {reason}", where=where,
                         fix="export it with --format transformers")
    return family


def describe(config: Any, name: str, where: str) -> Description:
    """Metadata and computed tensors of a model.

    Args:
        config: The transformers config of the folder.
        name: Name that programs show.
        where: The folder, for errors.

    Raises:
        InputError: llama.cpp cannot compute it, see `family_of`.
    """
    family = family_of(config, where)
    notes = []
    length = int(config.max_position_embeddings)
    window = _window(config)
    if window is not None and family.arch != "gemma3" and window < length:
        notes.append(f"llama.cpp computes this architecture without its sliding window, so the file states a context "
                     f"of {window:,} tokens (the window) instead of {length:,}")
        length = window
    if rope.kind(config) == "dynamic":
        notes.append(f"rotary scaling beyond {length:,} tokens is not in the file; up to there it has no effect")
    rotary, tensors = rope.describe(config)
    if rope.kind(config) == "longrope":
        original = rotary["rope.scaling.original_context_length"][1]
        notes.append(f"llama.cpp uses the long rotary factors where it allocates more than {original:,} tokens, also "
                     "for shorter texts, for which transformers uses the short ones")
    keys: Metadata = {
        "context_length": ("UINT32", length),
        "embedding_length": ("UINT32", config.hidden_size),
        "block_count": ("UINT32", config.num_hidden_layers),
        "feed_forward_length": ("UINT32", config.intermediate_size),
        "attention.head_count": ("UINT32", config.num_attention_heads),
        "attention.head_count_kv": ("UINT32", config.num_key_value_heads or config.num_attention_heads),
        "attention.key_length": ("UINT32", rope.head_dim(config)),
        "attention.value_length": ("UINT32", rope.head_dim(config)),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", config.rms_norm_eps),
        "vocab_size": ("UINT32", config.vocab_size),
        **rotary, **(_gemma_keys(config, window) if family.arch == "gemma3" else {})}
    if family.arch == "phi3":
        keys["attention.sliding_window"] = ("UINT32", 0)    # 0 tells Phi-4 from Phi-3 and means that there is none
    general: Metadata = {
        "general.architecture": ("STRING", family.arch), "general.type": ("STRING", "model"),
        "general.name": ("STRING", name)}
    return Description(family, general | {f"{family.arch}.{key}": value for key, value in keys.items()},
                       tensors, tuple(notes))


def _window(config: Any) -> int | None:
    """The sliding window of a model that uses one in any layer."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return int(window) if kinds is not None or getattr(config, "use_sliding_window", True) else None


def _gemma_keys(config: Any, window: int | None) -> Metadata:
    """Gemma's sliding window, the layers that have it, and the cap of the logits."""
    keys: Metadata = {}
    if window is not None:
        keys["attention.sliding_window"] = ("UINT32", window)
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        if slides != [(layer + 1) % 6 != 0 for layer in range(len(slides))]:    # llama.cpp's own pattern
            keys["attention.sliding_window_pattern"] = ("ARRAY", slides)
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = ("FLOAT32", config.final_logit_softcapping)
    return keys
