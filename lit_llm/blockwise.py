"""Causal attention of equally long documents on a CPU, in blocks of queries.

Queries, keys and values flow in, what each query has read flows out. A block is two batched products of matrices and a
softmax over the keys up to its end, which a machine's libraries do well in bfloat16; torch's own CPU kernel takes two
to six times as long there. The backward pass computes probabilities again, so memory does not grow with the square of a
length. In bfloat16 scores leave their product rounded, as in transformers' eager attention, and what comes out is a
little closer to the exact result than its; float32 and float64 lose nothing. Knows nothing of borders, models or masks.

    N documents times key heads, G query heads that share a key head, L tokens
    D numbers per head of queries and keys, E of values
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

BLOCK = 64                                          # queries


def causal(query_NGLD: Tensor, key_NLD: Tensor, value_NLE: Tensor, *, scale: float,
           window: int | None = None) -> Tensor:
    """softmax(scale * query @ key.T) @ value, each query over the keys up to its own place.

    Args:
        query_NGLD: (N, G, L, D).
        key_NLD: (N, L, D), of the same type.
        value_NLE: (N, L, E).
        scale: Of the scores.
        window: Keys that a query sees, itself included; null sees all before it.

    Returns:
        (N, G, L, E).
    """
    length = key_NLD.shape[1]
    out = _attend(query_NGLD, key_NLD, value_NLE, scale, min(window or length, length))
    assert isinstance(out, Tensor)
    return out


# One operation to whoever looks on, so that selective recomputing can keep what it gives.

@torch.library.custom_op("lit_llm::causal_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    out = query.new_empty(*query.shape[:3], value.shape[2])
    for first, start, stop in _blocks(query.shape[2], window):
        shares = _shares(query, key, first, start, stop, scale, window)
        out[:, :, start:stop] = torch.bmm(shares, value[:, first:stop]).view(*query.shape[:2], stop - start, -1)
    return out


def _blocks(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end of both) of each block."""
    for start in range(0, length, BLOCK):
        yield max(0, start - window + 1), start, min(start + BLOCK, length)


def _shares(query: Tensor, key: Tensor, first: int, start: int, stop: int, scale: float, window: int) -> Tensor:
    """(N, G * queries, keys) probabilities of a block; the mask and the scale cost no pass of their own."""
    mask = _mask(query.shape[1], stop - start, start - first, window, query.dtype)
    scores = torch.baddbmm(mask, _rows(query, start, stop), key[:, first:stop].transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1)


def _rows(states: Tensor, start: int, stop: int) -> Tensor:
    """(N, G * queries, D): a block's queries of all heads of a group, one head below the other."""
    count, groups, _, width = states.shape
    return states[:, :, start:stop].reshape(count, groups * (stop - start), width)


def _mask(groups: int, queries: int, before: int, window: int, dtype: torch.dtype) -> Tensor:
    """(G * queries, before + queries): 0 where a query sees a key, -inf elsewhere."""
    wide = 1 << before.bit_length()                 # keys before a block, of this one and of others about as far back
    mask = _wide_mask(groups, wide, window if window < before + queries else None, dtype)
    return mask[:, :queries, wide - before:wide + queries].reshape(groups * queries, before + queries)


@lru_cache(maxsize=64)
def _wide_mask(groups: int, before: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """(G, BLOCK, before + BLOCK): all blocks and lengths cut their masks out of it, which are too many to keep."""
    back = before + torch.arange(BLOCK)[:, None] - torch.arange(before + BLOCK)     # how far back the key lies
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf")).repeat(groups, 1, 1)


@torch.library.custom_op("lit_llm::causal_attention_backward", mutates_args=())
def _derive(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; sums over blocks are float32 or wider."""
    count, groups, length, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.empty(query.shape, dtype=query.dtype)
    grad_key, grad_value = (torch.zeros(states.shape, dtype=wide) for states in (key, value))
    for first, start, stop in _blocks(length, window):
        shares, above = _shares(query, key, first, start, stop, scale, window), _rows(grad, start, stop)
        grad_value[:, first:stop] += torch.bmm(shares.transpose(1, 2), above)
        scores = torch.bmm(above, value[:, first:stop].transpose(1, 2))
        scores = torch._softmax_backward_data(scores, shares, -1, query.dtype)
        grad_query[:, :, start:stop] = torch.bmm(scores, key[:, first:stop]).view(count, groups, stop - start, width)
        grad_key[:, first:stop] += torch.bmm(scores.transpose(1, 2), _rows(query, start, stop))
    return grad_query.mul_(scale), grad_key.mul_(scale).to(key.dtype), grad_value.to(value.dtype)


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[2])


@_derive.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
      ) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    *states, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*states)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_derive(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None)


_attend.register_autograd(_backward, setup_context=_remember)
