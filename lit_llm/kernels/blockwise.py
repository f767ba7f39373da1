"""Causal attention of packed documents on a CPU, in blocks of queries.

Documents of similar length are stacked; a block then consists of two batched matrix products and a softmax over the
keys up to its end, which CPU libraries do well in bfloat16; torch's own CPU kernel takes two to six times as long
there. The backward pass recomputes probabilities, so memory does not grow with the square of a length. In bfloat16
scores are rounded after their product, as in transformers' eager attention, and the result is slightly closer to the
exact one; float32 and float64 lose nothing.

Without this kernel, with torch's attention for each stack of documents, a training step of a 6M-parameter Llama takes
1.15 times as long in bfloat16 (1.05 to 1.20) and as long in float32 (0.99 to 1.03), a validation as long in both.
Measured by `tests/benchmarks/kernel_times.py` on one busy core of an AMD EPYC (Zen 4) with a vocabulary of 8,000.

    T tokens of a row, H heads of queries, K of keys and values, D numbers per head of queries and keys, E of values
    N documents of a stack times K, G query heads that share a key head, L tokens of the longest of the stack
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_llm.system.private import torch as torch_private

BLOCK = 64                                          # queries
STEP = 16                                           # tokens; lengths are padded to a multiple


class Stacks(NamedTuple):
    """The reordering that puts documents of similar length together; null if nothing moves."""

    order: Tensor | None                            # token at each position; short documents repeat their last token
    back: Tensor | None                             # (T,) position of each token
    repeated: Tensor | None                         # positions of repeated tokens
    shapes: list[tuple[int, int]]                   # (documents, tokens of each) of every stack


@lru_cache(maxsize=64)
def stacks(borders: tuple[int, ...]) -> Stacks:
    """The stacks of documents with these boundaries; cached, because every layer of a step uses the same.

    Lengths are rounded up to a multiple of STEP. Positions after a document's end are hidden from it by causality, and
    their results are dropped.

    >>> stacks((0, 3, 10, 12)).order.tolist()[:9], stacks((0, 3, 10, 12)).shapes
    ([0, 1, 2, 2, 2, 2, 2, 3, 4], [(3, 7)])
    """
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, stop in pairwise(borders):
        if stop > start:
            by_length.setdefault(-(-(stop - start) // STEP), []).append((start, stop - start))
    if all(len(alike) == 1 for alike in by_length.values()):
        return Stacks(None, None, None, [(1, length) for alike in by_length.values() for _, length in alike])
    moved, order, back, repeated, shapes = False, [], torch.empty(borders[-1], dtype=torch.int64), [], []
    at = 0
    for alike in by_length.values():
        longest = max(length for _, length in alike)
        shapes.append((len(alike), longest))
        for start, length in alike:
            order.append(torch.arange(start, start + longest).clamp_(max=start + length - 1))
            back[start:start + length] = torch.arange(at, at + length)
            repeated.append(torch.arange(at + length, at + longest))
            moved |= start != at or length != longest
            at += longest
    return Stacks(torch.cat(order), back, torch.cat(repeated), shapes) if moved else Stacks(None, None, None, shapes)


def causal(query_HTD: Tensor, key_KTD: Tensor, value_KTE: Tensor, borders: Sequence[int], *, scale: float,
           window: int | None = None) -> Tensor:
    """softmax(scale * query @ key.T) @ value, each query over the keys of its document up to its own position.

    Args:
        query_HTD: (H, T, D).
        key_KTD: (K, T, D), of the same type; K divides H.
        value_KTE: (K, T, E).
        borders: Document boundaries, from 0 to T.
        scale: Scale of the scores.
        window: Keys that a query attends to, including itself; null is all preceding ones.

    Returns:
        (T, H, E).
    """
    out = _attend(query_HTD, key_KTD, value_KTE, borders, scale, window or query_HTD.shape[1])
    assert isinstance(out, Tensor)
    return out


# Registered as one operator, so that selective recomputation can save its result.

@torch.library.custom_op("lit_llm::causal_attention", mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scale: float, window: int) -> Tensor:
    layout, shared = stacks(tuple(borders)), len(key)
    out = _room(layout, query.shape[1], len(query), value)
    inputs = (_stacked(tensor.transpose(0, 1), layout, shared) for tensor in (query, key, value))
    for queries, keys, values, target in zip(*inputs, _cut(out, layout, shared), strict=True):
        _attend_stack(queries, keys[:, 0], values[:, 0], target, scale, window)
    return _restored(out, layout)


@torch.library.custom_op("lit_llm::causal_attention_backward", mutates_args=())
def _derive(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scale: float, window: int
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; sums over blocks are in float32 or wider."""
    layout, shared, states = stacks(tuple(borders)), len(key), (query, key, value)
    grads = [_room(layout, query.shape[1], len(tensor), tensor) for tensor in states]
    inputs = (_stacked(tensor.transpose(0, 1), layout, shared) for tensor in states)
    for above, queries, keys, values, *targets in zip(_stacked(grad, layout, shared, silent=True), *inputs,
                                                      *(_cut(tensor, layout, shared) for tensor in grads), strict=True):
        _derive_stack(above, queries, keys[:, 0], values[:, 0], targets, scale, window)
    grad_query, grad_key, grad_value = (_restored(tensor, layout).transpose(0, 1) for tensor in grads)
    return grad_query, grad_key, grad_value


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scale: float, window: int) -> Tensor:
    return query.new_empty(query.shape[1], len(query), value.shape[2])


@_derive.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, borders: Sequence[int], scale: float, window: int
      ) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (tensor.new_empty(tensor.shape[1], len(tensor), tensor.shape[2]).transpose(0, 1)
                       for tensor in (query, key, value))
    return one, two, three


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    *states, ctx.borders, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*states)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_derive(grad, *ctx.saved_tensors, ctx.borders, ctx.scale, ctx.window), None, None, None)


_attend.register_autograd(_backward, setup_context=_remember)


# ---- stacks ----------------------------------------------------------------------------------------------------------

def _room(layout: Stacks, tokens: int, heads: int, like: Tensor) -> Tensor:
    """(positions, heads, width) buffer for results in the order of stacks."""
    return like.new_empty(tokens if layout.order is None else len(layout.order), heads, like.shape[-1])


def _cut(places: Tensor, layout: Stacks, shared: int) -> list[Tensor]:
    """(documents, K, G, L, width) of each stack: views of (places, heads, width)."""
    parts = places.split([count * length for count, length in layout.shapes])
    return [part.unflatten(0, shape).unflatten(2, (shared, -1)).permute(0, 2, 3, 1, 4)
            for part, shape in zip(parts, layout.shapes, strict=True)]


def _stacked(states: Tensor, layout: Stacks, shared: int, silent: bool = False) -> list[Tensor]:
    """(N, G, L, width) of each stack, contiguous, from (T, heads, width); `silent` zeroes repeated tokens."""
    if layout.order is not None and layout.repeated is not None:
        states = states.index_select(0, layout.order)
        if silent:
            states.index_fill_(0, layout.repeated, 0.0)
    return [part.contiguous().flatten(0, 1) for part in _cut(states, layout, shared)]


def _restored(places: Tensor, layout: Stacks) -> Tensor:
    """(T, heads, width): the results in the original order."""
    return places if layout.back is None else places.index_select(0, layout.back)


# ---- a stack ---------------------------------------------------------------------------------------------------------

def _attend_stack(queries: Tensor, keys: Tensor, values: Tensor, target: Tensor, scale: float, window: int) -> None:
    """Attention of one stack, from (N, G, L, D), (N, L, D) and (N, L, E) into the target."""
    buffer = _buffer(queries)
    for first, start, stop in _blocks(queries.shape[2], window):
        shares = _shares(queries, keys, first, start, stop, scale, window, buffer)
        _put(target, start, stop, torch.bmm(shares, values[:, first:stop]))


def _derive_stack(above: Tensor, queries: Tensor, keys: Tensor, values: Tensor, targets: Sequence[Tensor],
                  scale: float, window: int) -> None:
    """Backward of one stack from the gradient (N, G, L, E), into the three targets."""
    buffer, other = _buffer(queries), _buffer(queries)
    wide = torch.promote_types(queries.dtype, torch.float32)
    grad_keys, grad_values = (torch.zeros(tensor.shape, dtype=wide) for tensor in (keys, values))
    for first, start, stop in _blocks(queries.shape[2], window):
        shares = _shares(queries, keys, first, start, stop, scale, window, buffer)
        grad_out, scores = _rows(above, start, stop), other[:shares.numel()].view(shares.shape)
        grad_values[:, first:stop] += torch.bmm(shares.transpose(1, 2), grad_out)
        torch.bmm(grad_out, values[:, first:stop].transpose(1, 2), out=scores)
        torch_private.softmax_backward(scores, shares, queries.dtype, scores)
        _put(targets[0], start, stop, _scaled(scores, keys[:, first:stop], scale))
        grad_keys[:, first:stop] += _scaled(scores.transpose(1, 2), _rows(queries, start, stop), scale)
    _put(targets[1], 0, keys.shape[1], grad_keys)
    _put(targets[2], 0, values.shape[1], grad_values)


def _blocks(length: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, end of both) of each block."""
    for start in range(0, length, BLOCK):
        yield max(0, start - window + 1), start, min(start + BLOCK, length)


def _buffer(query: Tensor) -> Tensor:
    """A buffer for the scores of any block."""
    count, groups, length, _ = query.shape
    return query.new_empty(count * groups * min(BLOCK, length) * length)


def _shares(query: Tensor, key: Tensor, first: int, start: int, stop: int, scale: float, window: int,
            buffer: Tensor) -> Tensor:
    """(N, G * queries, keys) probabilities of a block, in the buffer."""
    (count, groups), queries, keys = query.shape[:2], stop - start, stop - first
    scores = buffer[:count * groups * queries * keys].view(count, groups * queries, keys)
    scores.baddbmm_(_rows(query, start, stop), key[:, first:stop].transpose(1, 2), beta=0, alpha=scale)
    apart = scores.view(count, groups, queries, keys)
    if stop - first > window:                       # the last query does not attend to the first key
        apart += _mask(queries, start - first, window, query.dtype)
    else:
        apart[..., start - first:] += _mask(queries, 0, queries, query.dtype)
    return torch.softmax(scores, -1, out=scores)


def _rows(states: Tensor, start: int, stop: int) -> Tensor:
    """(N, G * queries, D): a block's queries of all heads of a group, head by head."""
    return states[:, :, start:stop].flatten(1, 2)


def _put(target: Tensor, start: int, stop: int, rows: Tensor) -> None:
    """Write them back into (documents, K, G, L, width)."""
    block = target[..., start:stop, :]
    block.copy_(rows.view(block.shape))


def _scaled(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Left @ right times a factor, rounded once."""
    return left.new_empty(len(left), left.shape[1], right.shape[2]).baddbmm_(left, right, beta=0, alpha=scale)


@lru_cache(maxsize=64)
def _mask(queries: int, before: int, window: int, dtype: torch.dtype) -> Tensor:
    """(queries, before + queries): 0 where a query attends to a key, -inf elsewhere."""
    back = before + torch.arange(queries)[:, None] - torch.arange(before + queries)     # distance of the key
    return torch.zeros(back.shape, dtype=dtype).masked_fill((back < 0) | (back >= window), float("-inf"))
