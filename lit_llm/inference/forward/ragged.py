"""One forward pass over all the tokens that there are: the next token of many requests, and parts of waiting prompts.

All tokens of a step are one row, as in packed training, and each attends to the keys and values in its request's slot.
The model is transformers' own. It calls `attention` in every layer, and hands it the `Step` as a keyword argument; the
same object takes the place of a cache, so that a layer's keys and values come to it first.

Shape suffixes: T tokens of the step, B requests, H query heads, K key heads, G query heads of a key head, L positions
of a slot, D width of a head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from lit_llm.inference.forward.slots import Pool, Slot
from lit_llm.kernels.attention import lit_varlen

NAME = "lit_ragged"


class UnsupportedError(Exception):
    """The attention of a model does something that is not computed here."""


class Part(NamedTuple):
    """Tokens of one request in a step.

    Args:
        slot: Where its keys and values are; `ids` are those before this step.
        ids: The tokens that are read now.
        every: Whether the logits after each of them are needed, and not only after the last.
    """

    slot: Slot
    ids: Sequence[int]
    every: bool = False


class _Rows(NamedTuple):
    """Requests of a pool that read one token each; theirs are its first slots, in order."""

    pool: Pool
    begin: int                                      # in the row of all tokens
    slots: Tensor                                   # (B,) 0, 1, 2 ...
    positions: Tensor                               # (B,) of the token in its slot
    length: int                                     # of the longest, with this token
    equal: bool                                     # whether all have that length

    @property
    def end(self) -> int:
        return self.begin + len(self.positions)


class _Chunk(NamedTuple):
    """Several tokens of a prompt."""

    slot: Slot
    begin: int                                      # in the row of all tokens
    length: int
    start: int                                      # in the slot


@dataclass(slots=True)
class Plan:
    """Where the tokens of a step come from and what they attend to; masks are made once for all layers."""

    rows: list[_Rows]
    fresh: list[_Chunk]                             # that begin a prompt; side by side in the row
    later: list[_Chunk]
    borders: Tensor                                 # (fresh + 1,) int32, from 0, of the prompts that begin
    longest: int
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)


class Step:
    """A step in the form in which a model is called.

    Args:
        generating: One-token parts, in the order of the slots at the beginning of each pool.
        reading: The other parts.
        device: Of the model.
    """

    def __init__(self, generating: Sequence[Part], reading: Sequence[Part], device: torch.device) -> None:
        begin, rows, chunks = 0, [], []
        by_pool: dict[int, list[Part]] = {}
        for part in generating:
            by_pool.setdefault(id(part.slot.pool), []).append(part)
        ordered = [part for parts in by_pool.values() for part in sorted(parts, key=lambda pooled: pooled.slot.index)]
        for parts in by_pool.values():
            positions = sorted((part.slot.index, len(part.slot.ids)) for part in parts)
            assert [index for index, _ in positions] == list(range(len(parts))), "generating requests come first"
            lengths = [length for _, length in positions]
            rows.append(_Rows(parts[0].slot.pool, begin, torch.arange(len(parts), device=device),
                              torch.tensor(lengths, device=device), max(lengths) + 1, len(set(lengths)) == 1))
            begin += len(parts)
        for part in sorted(reading, key=lambda chunk: bool(chunk.slot.ids)):
            chunks.append(_Chunk(part.slot, begin, len(part.ids), len(part.slot.ids)))
            ordered.append(part)
            begin += len(part.ids)
        fresh = [chunk for chunk in chunks if not chunk.start]
        counts = torch.tensor([0, *(chunk.length for chunk in fresh)], dtype=torch.int32)
        self.plan = Plan(rows, fresh, [chunk for chunk in chunks if chunk.start],
                         counts.cumsum(0, dtype=torch.int32).to(device), int(counts.max()))
        self.parts = ordered
        self.layer = -1
        self.windows: dict[int, int | None] = {}    # the sliding window of each layer
        self.ids = torch.tensor([[id_ for part in ordered for id_ in part.ids]], device=device)
        self.positions = torch.tensor([[len(part.slot.ids) + at for part in ordered for at in range(len(part.ids))]],
                                      device=device)

    @cached_property
    def ends(self) -> Tensor:
        """(rows,) the tokens whose logits are needed, in the row of all tokens: the last of each part, or every one."""
        counts = torch.tensor([len(part.ids) for part in self.parts], device=self.ids.device)
        ends = counts.cumsum(0) - 1
        if not any(part.every for part in self.parts):
            return ends
        return torch.cat([torch.arange(int(end) + 1 - len(part.ids) if part.every else int(end), int(end) + 1,
                                       device=ends.device) for part, end in zip(self.parts, ends, strict=True)])

    def logits(self, model: Any) -> list[Tensor]:
        """Float32 logits of each part: (V,) after its last token, or (count, V) after every token.

        Keys and values of all tokens are in the slots then.

        Args:
            model: A causal LM whose attention is `NAME`.
        """
        with torch.no_grad():
            output = model(input_ids=self.ids, position_ids=self.positions, past_key_values=self, use_cache=True,
                           logits_to_keep=self.ends, step=self)
        logits: Tensor = output.logits[0].float()
        assert len(logits) == len(self.ends)
        if not any(part.every for part in self.parts):
            return list(logits)
        rows = logits.split([len(part.ids) if part.every else 1 for part in self.parts])
        return [logits_TV if part.every else logits_TV[0] for part, logits_TV in zip(self.parts, rows, strict=True)]

# ---- the interface of transformers for a cache -----------------------------------------------------------------------

    is_compileable = False
    is_sliding = (False,)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No tokens before the row, since positions are given."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Length and offset of the keys; no mask is made of them."""
        return self.ids.shape[1], 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
               ) -> tuple[Tensor, Tensor]:
        """Write a layer's (1, K, T, D) keys and values into the slots."""
        self.layer = layer_idx
        for rows in self.plan.rows:
            for state, new in zip(rows.pool.layer(layer_idx, key_states, value_states), (key_states, value_states),
                                  strict=True):
                written = new[0, :, rows.begin:rows.end].transpose(0, 1).to(state.dtype)
                state[rows.slots, :, rows.positions] = written
        for chunk in (*self.plan.fresh, *self.plan.later):
            for state, new in zip(chunk.slot.pool.layer(layer_idx, key_states, value_states),
                                  (key_states, value_states), strict=True):
                state[chunk.slot.index, :, chunk.start:chunk.start + chunk.length] = (
                    new[0, :, chunk.begin:chunk.begin + chunk.length])
        return key_states, value_states


def register() -> str:
    """Make `lit_ragged` known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    return NAME


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              step: Step | None = None, scaling: float | None = None, sliding_window: int | None = None,
              softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
    """Attention of a step, in the shape that transformers' models call.

    Args:
        module: The layer.
        query: (1, H, T, D).
        key: (1, K, T, D), which is in the slots already.
        value: (1, K, T, E).
        attention_mask: Always null.
        step: Of all tokens.
        scaling: Factor on the scores; null is 1/sqrt(D).
        sliding_window: Tokens that a query sees, itself included; null sees all.
        softcap: Not computed here.
        s_aux: Not computed here.

    Returns:
        (1, T, H, E) and null for the weights.

    Raises:
        UnsupportedError: The model asks for something else; its requests are computed one by one then.
    """
    if softcap is not None or s_aux is not None:
        raise UnsupportedError("its attention caps its scores or uses sinks")
    if step is None or attention_mask is not None or step.layer < 0:
        raise UnsupportedError("its attention does not receive the plan of a step, or its layers share keys and values")
    plan, number, out = step.plan, step.layer, []
    step.windows[number] = sliding_window
    for rows in plan.rows:
        out.append(_generating(plan, rows, query[0, :, rows.begin:rows.end], rows.pool.layers[number], scaling,
                               sliding_window))
    if plan.fresh:
        begin, end = plan.fresh[0].begin, plan.fresh[-1].begin + plan.fresh[-1].length
        out.append(lit_varlen(
            module, query[:, :, begin:end], key[:, :, begin:end], value[:, :, begin:end], None, cu_seqlens=plan.borders,
            max_seqlen=plan.longest, scaling=scaling, sliding_window=sliding_window)[0][0])
    for chunk in plan.later:
        out.append(_reading(plan, chunk, query[0, :, chunk.begin:chunk.begin + chunk.length],
                            chunk.slot.pool.layers[number], scaling, sliding_window))
    step.layer = -1
    return (out[0] if len(out) == 1 else torch.cat(out)).unsqueeze(0), None


def _generating(plan: Plan, rows: _Rows, query: Tensor, states: tuple[Tensor, Tensor], scaling: float | None,
                window: int | None) -> Tensor:
    """(H, B, D) in, (B, H, E) out: one token of each request against its slot."""
    _heads, count, _ = query.shape
    key, value = (state[:count, :, :rows.length] for state in states)
    grouped = query.unflatten(0, (key.shape[1], -1)).permute(2, 0, 1, 3).to(key.dtype)      # (B, K, G, D)
    name, mask = (id(rows.pool), window), None
    if not rows.equal or (window is not None and window < rows.length):
        if name not in plan.masks:
            at, last = torch.arange(rows.length, device=query.device), rows.positions[:, None]
            seen = at <= last if window is None else (at <= last) & (at > last - window)
            plan.masks[name] = _added(seen, key.dtype)[:, None, None]
        mask = plan.masks[name]
    return sdpa(grouped, key, value, attn_mask=mask, scale=scaling).flatten(1, 2).to(query.dtype)


def _reading(plan: Plan, chunk: _Chunk, query: Tensor, states: tuple[Tensor, Tensor], scaling: float | None,
             window: int | None) -> Tensor:
    """(H, count, D) in, (count, H, E) out: a later part of a prompt against its slot."""
    end = chunk.start + chunk.length
    key, value = (state[chunk.slot.index, :, :end] for state in states)
    groups = len(query) // len(key)
    name = (id(chunk.slot), window)
    if name not in plan.masks:
        seen = torch.ones(chunk.length, end, dtype=torch.bool, device=query.device).tril(chunk.start)
        seen = seen if window is None else seen.triu(chunk.start - window + 1)
        plan.masks[name] = _added(seen, key.dtype).repeat(groups, 1)
    grouped = query.reshape(1, len(key), groups * chunk.length, -1).to(key.dtype)
    out = sdpa(grouped, key[None], value[None], attn_mask=plan.masks[name], scale=scaling)
    return out.reshape(len(query), chunk.length, -1).transpose(0, 1).to(query.dtype)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to scores: torch would convert it anew in every layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
