"""Reduce a model's config to a small config of the same architecture, with fewer layers, heads, experts and tokens.

Everything that determines the computation is kept: scalars (multipliers, scales, caps, epsilons), the head width with
its rotary settings, kinds of attention and of layers, biases, tying. Lengths in tokens (windows, chunks) become shorter
than the few short documents that are processed.

Rules match the names of keys, which differ between architectures, so `candidates` yields several configs in the order
in which to try them; not all of them can be built.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

VOCABULARY = 96
INNER_WIDTH = 96
FEW = (4, 2, 6, 8, 3, 5, 7, 10, 12, 1)              # heads, the preferred number first
MORE = (8, 4, 6)                                    # for architectures with a fixed number of groups
MOST_LAYERS = 17                                    # limit on a period
WINDOW = 5                                          # tokens, fewer than the documents have
HEADS = re.compile(r"(^|_)n(um)?_([a-z_]*_)?heads?$|attention_heads$|^num_query_groups$")
SHARED = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups", "n_groups",
          "mamba_n_groups", "mamba_ngroups")
WIDTHS = re.compile(r"^(hidden_size|n_embd|d_model|emb_dim|embedding_dim|((in|out)put_)?embedding_size|lru_width"
                    r"|word_embed_proj_dim|mamba_d_ssm|attention_hidden_size)$")
INNER = re.compile(r"intermediate_size|ffn_dim|ffn_hidden_size|^dff$|^dim_ff$|^d_inner$|^n_inner$|^feed_forward_size$")
LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(en|de)coder_layers|attention_layers"
                    r"|num_layers_per_stack|num_blocks)$")
EXPERTS = re.compile(r"^(num_(local_)?experts|n_routed_experts|moe_num_experts|zero_expert_num)$")
CHOSEN = re.compile(r"^(num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k_experts)$")
PERIODS = re.compile(r"period|interval|_step$|every|pattern|offset|dense_replace|num_dense_layers|layer_start"
                     r"|group_size|layers_per_attn")
WINDOWS = re.compile(r"sliding_window(_size)?$|window_(size|len)$|^local_attention$|floor_scale"
                     r"|log_scaling_n_floor")
VOCABULARIES = re.compile(r"vocab(?!.*divisible)")
RANDOM = re.compile(r"drop|jitter")                 # keys that make a forward pass random


def candidates(config: Any, *, whole: bool, seq_len: int | None = None) -> Iterator[Any]:
    """Small configs of the same architecture, the smallest first.

    Args:
        config: Config of a transformers model.
        whole: The model is already small: its own sizes are tried first.
        seq_len: Tokens of the longest document in training; null if unknown.

    Yields:
        Configs; inconsistent keys are detected when a model is built.
    """
    ways: list[dict[str, Any]] = [{"layers": False, "heads": ()}] if whole else []
    for way in (*ways, {"layers": True, "heads": FEW}, {"layers": True, "heads": MORE},
                {"layers": False, "heads": FEW}, {"layers": True, "heads": ()}):
        with suppress(Exception):                   # architectures raise errors of many types
            yield _rebuilt(config, _shrunk(config.to_dict(), seq_len=seq_len, **way))


def _rebuilt(config: Any, facts: dict[str, Any]) -> Any:
    again = type(config).from_dict(copy.deepcopy(facts))
    again.use_cache = False
    return again


def _shrunk(facts: dict[str, Any], *, layers: bool, heads: tuple[int, ...], seq_len: int | None = None
            ) -> dict[str, Any]:
    """Reduced keys of a config and its sub-configs; the first number of heads that divides, or all."""
    facts = {key: _shrunk(value, layers=layers, heads=heads, seq_len=seq_len) if _is_config(key, value)
             else copy.deepcopy(value) for key, value in facts.items()}
    for key, value in facts.items():
        if RANDOM.search(key) and isinstance(value, float):
            facts[key] = 0.0
        elif key.endswith("chunk_size") and _is_size(value):        # of scans, which pad to this length
            facts[key] = min(value, 16 if key != "attention_chunk_size" else WINDOW)
        elif key.startswith("index_") and re.search("topk|block", key) and _is_size(value):     # sparse attention
            facts[key] = min(value, 2 if key.endswith("blocks") else 4)
        elif WINDOWS.search(key) and _is_count(value) and value > WINDOW:
            facts[key] = float(WINDOW) if isinstance(value, float) else WINDOW
    _switch_early(facts, seq_len)
    facts.pop("dtype", None)
    facts.pop("quantization_config", None)
    if layers:
        _cut_layers(facts)
    if heads:
        _narrow(facts, heads)
        _fewer_tokens(facts)
    return facts


def _is_config(key: str, value: object) -> bool:
    return isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder"))


def _is_count(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _switch_early(facts: dict[str, Any], seq_len: int | None) -> None:
    """Let rotary embeddings with two lengths switch within the documents, if they will in the run.

    Such a model uses the longest document of a packed sequence, so short documents would get a long document's angles.
    """
    rope = facts.get("rope_parameters") or {}
    ropes = [rope, *(own for own in rope.values() if isinstance(own, dict))]
    if any(own.get("rope_type") == "longrope" for own in ropes):
        for home in (facts, *ropes):
            switch = home.get("original_max_position_embeddings") or 0
            if switch and (seq_len is None or seq_len > switch):
                home["original_max_position_embeddings"] = 2 * WINDOW


# ---- layers ----------------------------------------------------------------------------------------------------------

def _cut_layers(facts: dict[str, Any]) -> None:
    """Keep the first layers that include every kind of layer in the config's lists and a whole period."""
    count = max([0, *(value for key, value in facts.items() if LAYERS.search(key) and isinstance(value, int))])
    if count < 3:
        return
    named = {key for key, value in facts.items() if _names_layers(key, value)}
    lists = [key for key, value in facts.items()
             if isinstance(value, list) and len(value) == count and key not in named]
    own = {int(place): value for place, value in (facts.get("per_layer_config") or {}).items()}
    kinds = list(zip(map(repr, map(own.get, range(count))), *(map(repr, facts[key]) for key in lists), strict=True))
    keep = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    for key, value in facts.items():
        if PERIODS.search(key) and isinstance(value, int) and not isinstance(value, bool) and value < MOST_LAYERS:
            keep = max(keep, value + 1)
        elif key in named:
            keep = max([keep, *(place + 1 for place in value[:1] if place < MOST_LAYERS)])
        elif key.endswith("_types") and isinstance(value, list) and len(value) < min(count, MOST_LAYERS):
            keep = max(keep, len(value))            # repeated kinds of layers
    keep = min(keep, count)
    if own:
        facts["per_layer_config"] = {place: value for place, value in own.items() if place < keep}
    for key, value in facts.items():
        if key in lists:
            facts[key] = value[:keep]
        elif key in named:
            facts[key] = [place for place in value if place < keep]
        elif LAYERS.search(key) and isinstance(value, int):
            facts[key] = max(1, round(value * keep / count))
        elif key == "num_kv_shared_layers" and value:
            facts[key] = max(1, keep // 2)


def _names_layers(key: str, value: object) -> bool:
    """Whether a list contains layer indices in ascending order."""
    return (isinstance(value, list) and bool(re.search(r"idxs$|indices$|layer_ids$|_layers$", key))
            and all(type(place) is int for place in value)
            and all(left < right for left, right in pairwise(value)))


# ---- widths ----------------------------------------------------------------------------------------------------------

def _narrow(facts: dict[str, Any], wanted: tuple[int, ...]) -> None:
    """Fewer heads of the same width; hidden and inner widths shrink in proportion."""
    heads = [value for key, value in facts.items() if HEADS.search(key) and _is_size(value)]
    asking = [value for key, value in facts.items() if HEADS.search(key) and _is_size(value)
              and key not in SHARED and not re.search(r"mamba|linear|index|local", key)]
    hidden = [value for key, value in facts.items() if WIDTHS.search(key) and _is_size(value)]
    shared = [value for key, value in facts.items() if key in SHARED and _is_size(value)]
    many = asking[0] if asking else max(heads, default=0)
    if many:
        width = facts.get("head_dim")
        wide = max(width if isinstance(width, int) else 0, max(hidden, default=0) // many) > 128
        order = (wanted[1], *wanted) if wide else wanted
        few = next((few for few in order if many % few == 0 and all(width % (many // few) == 0 for width in hidden)
                    and all(few % _share(width, many // few, few) == 0 for width in shared)), many)
        by = many // few
    else:
        few, by = 0, max(1, max(hidden, default=64) // 64)
        by = by if all(width % by == 0 for width in hidden) else 1
    expanded = max(hidden, default=0) * (facts.get("expand") or 0)      # Mamba's inner width, implied by other keys
    _divide(facts, by, few, expanded)
    for own in (facts.get("per_layer_config") or {}).values():
        if isinstance(own, dict):
            _divide(own, by, few, expanded)
    _fewer_experts(facts)


def _divide(facts: dict[str, Any], by: int, few: int, expanded: int) -> None:
    """Divide numbers of heads and widths by the same divisor where they are multiples of it."""
    for key, value in facts.items():
        if key in SHARED and _is_size(value):
            facts[key] = _share(value, by, few)
        elif _is_size(value) and (HEADS.search(key) or WIDTHS.search(key)):
            facts[key] = value // by if value % by == 0 else value
        elif key.endswith("_lora_rank") and _is_size(value):
            facts[key] = min(value, 32)
        elif INNER.search(key) and isinstance(value, int | list) and value:
            bound = expanded // by if value == expanded else INNER_WIDTH
            facts[key] = [min(bound, width) for width in value] if isinstance(value, list) else min(bound, value)
        elif key.endswith("heads_per_layer") and isinstance(value, list):
            facts[key] = [max(1, value_of_layer // by) for value_of_layer in value]


def _share(heads: int, by: int, few: int) -> int:
    """Number of key-value heads after reducing query heads: one stays one, several stay several."""
    return 1 if heads == 1 else min(few or heads, max(2, heads // by)) if by > 1 else heads


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _fewer_experts(facts: dict[str, Any]) -> None:
    """Reduce experts to the minimum that grouped routing allows."""
    chosen = max([1, *(value for key, value in facts.items() if CHOSEN.search(key) and isinstance(value, int))])
    groups = max(1, facts.get("n_group") or facts.get("num_expert_group") or 1)
    kept_groups = max(1, facts.get("topk_group") or 1)
    for key, value in facts.items():
        if EXPERTS.search(key) and isinstance(value, int) and value > 0:
            facts[key] = min(value, groups * max(2, math.ceil(chosen / kept_groups), -(-(chosen + 2) // groups)))


def _fewer_tokens(facts: dict[str, Any]) -> None:
    sizes = [value for key, value in facts.items() if VOCABULARIES.search(key) and isinstance(value, int)]
    if not sizes or facts.get("vocab_size", 0) <= VOCABULARY:
        return
    for key, value in facts.items():
        if VOCABULARIES.search(key) and isinstance(value, int):
            facts[key] = min(value, VOCABULARY)
        elif key.endswith("token_id") and isinstance(value, int) and value >= VOCABULARY:
            facts[key] = VOCABULARY - 1
        elif key.endswith("token_id") and isinstance(value, list):
            facts[key] = [min(id_, VOCABULARY - 1) for id_ in value]
