"""A linear head and cross-entropy in one operation, from hidden states and targets to losses and gradients.

Logits are computed for a slice of tokens at a time, in one buffer: memory does not grow with the number of tokens.
Gradients are computed in the forward pass while a slice's logits exist, which saves recomputing them. On CUDA products
stay in the float32 that they were summed in, and a Triton kernel, if available, computes losses and gradients in one
pass. Without gradients `tiles.py` is used; `borrowed.py` has external kernels.

Without this kernel and `tiles.py`, with `F.cross_entropy` on recomputed chunks of logits, a training step of a
6M-parameter Llama takes 1.15 to 1.25 times as long in float32 and 1.25 times in bfloat16, a validation 1.04 to 1.19 and
1.13 times. Measured as in `blockwise.py`.

    N tokens, V vocabulary, D hidden, K trained rows of the head
"""

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)
SLICE_BYTES = {"cpu": 32 * 2**20, "cuda": 256 * 2**20}      # logits of one matrix product, in the head's precision
WORK_BYTES = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}        # float32 logits at a time, within a CPU's cache


class Head(NamedTuple):
    """A linear head with the transform of its logits.

        z = factor * (hidden @ weight.T + bias)      logits = cap * tanh(z / cap), or z without a cap

    Args:
        weight_VD: The matrix.
        bias_V: The bias; may be null.
        factor: See `anatomy.logit_adjustment`.
        cap: See there.
        index_K: Indices of rows that `rows_KD` replace.
        rows_KD: Trained rows of a frozen matrix.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    factor: float = 1.0
    cap: float | None = None
    index_K: Tensor | None = None
    rows_KD: Tensor | None = None


class Part(NamedTuple):
    """Some tokens with their logits, valid until the next part is requested."""

    tokens: slice                                   # of N
    logits: Tensor                                  # (n, V) float32 or wider; may be overwritten
    half: Tensor | None                             # (n, V) of the slice's buffer, if that is a different one


def computed_in(hidden: Tensor) -> torch.dtype:
    """The dtype of matrix products."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def slice_rows(vocabulary: int, size: int, device: str) -> tuple[int, int]:
    """Tokens of a slice, and of a part that is processed in float32; an element of the slice has `size` bytes.

    >>> slice_rows(32000, 2, "cpu")
    (524, 32)
    """
    rows = max(16, SLICE_BYTES.get(device, SLICE_BYTES["cuda"]) // (size * vocabulary))
    if device != "cpu" and rows > 128:              # tile size of a GPU's products
        rows -= rows % 128
    return rows, max(1, min(rows, WORK_BYTES.get(device, WORK_BYTES["cuda"]) // (4 * vocabulary)))


_traced_for: str | None = None


@contextmanager
def sliced_as_on(device: str) -> Generator[None, None, None]:
    """Use the slice size of another device, to trace a step that will run there."""
    global _traced_for
    before, _traced_for = _traced_for, device
    try:
        yield
    finally:
        _traced_for = before


def _slices(hidden_ND: Tensor, head: Head) -> Iterator[tuple[slice, Tensor, Iterator[Part]]]:
    """Yield the tokens of each slice, its buffer of logits, and its parts, to be consumed before the next slice."""
    count, vocabulary = len(hidden_ND), len(head.weight_VD)
    dtype, device = hidden_ND.dtype, hidden_ND.device
    wide = torch.promote_types(dtype, torch.float32)
    rows, few = (min(count, number) for number in slice_rows(vocabulary, dtype.itemsize, _traced_for or device.type))
    exact = keeps_sums(hidden_ND)                  # then a slice is one part with unrounded logits
    few = rows if exact else few
    buffer = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    work = torch.empty(few, vocabulary, dtype=wide, device=device) if wide != dtype else None

    def parts(start: int, logits: Tensor) -> Iterator[Part]:
        for at in range(0, len(logits), few):
            half = logits[at:at + few]
            taken = slice(start + at, start + at + len(half))
            if work is None:
                yield Part(taken, half, None)
            else:
                yield Part(taken, work[:len(half)] if exact else work[:len(half)].copy_(half), half)

    for start in range(0, count, max(1, rows)):
        taken = slice(start, min(count, start + rows))
        logits = buffer[:taken.stop - start]
        made = work[:len(logits)] if exact and work is not None else logits
        multiply(hidden_ND[taken], head.weight_VD.T, made)
        if head.rows_KD is not None and head.index_K is not None:
            own = made.new_empty(len(made), len(head.rows_KD))
            made.index_copy_(1, head.index_K, multiply(hidden_ND[taken], head.rows_KD.T, own))
        yield taken, logits, parts(start, logits)


def keeps_sums(hidden: Tensor) -> bool:
    """Whether half-precision products can be returned in float32: on Nvidia GPUs since Ampere."""
    return hidden.is_cuda and hidden.dtype in (torch.float16, torch.bfloat16) and _sums_leave(hidden.device)


@cache
def _sums_leave(device: torch.device) -> bool:
    """Whether a device supports it, tested once."""
    try:
        half, wide = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.zeros(16, 16, device=device)
        multiply(half, half, wide)
        torch.addmm(wide, half, half, out_dtype=wide.dtype, out=wide)
        return bool((wide == 32).all())
    except (RuntimeError, TypeError) as error:
        log.info("matrix products are rounded to half precision: %s", " ".join(str(error).split())[:200])
        return False


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`left @ right`, in the precision of `out`."""
    if out.dtype != left.dtype:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left, right, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where total is float32 or wider; on CUDA without a copy of the product."""
    if keeps_sums(left):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def adjust(logits: Tensor, head: Head) -> Tensor | None:
    """Apply bias, factor and cap in place; returns d logits / d z with a cap."""
    if head.bias_V is not None:
        logits += head.bias_V
    if head.cap is None:
        if head.factor != 1.0:
            logits *= head.factor
        return None
    logits.mul_(head.factor / head.cap).tanh_()
    slope = 1 - logits * logits
    logits *= head.cap
    return slope


def nll(hidden_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor:
    """() sum of losses, float32 or wider, with gradients for hidden states and the trained parts of the head."""
    total = _Nll.apply(hidden_ND, targets_N, *head)
    assert isinstance(total, Tensor)
    return total


class _Nll(torch.autograd.Function):
    """d loss / dz = (softmax(logits) - onehot(target)) * d logits / dz; a frozen head (LoRA) gets no gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, targets_N: Tensor, weight_VD: Tensor, bias_V: Tensor | None,
                factor: float, cap: float | None, index_K: Tensor | None, rows_KD: Tensor | None) -> Tensor:
        dtype = computed_in(hidden_ND)
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.to(dtype), weight_VD.to(dtype)
            own = None if rows_KD is None else rows_KD.to(dtype)
            head = Head(weight, bias_V, factor, cap, index_K, own)
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[2] else None
            grad_bias = torch.zeros_like(weight_VD[:, 0], dtype=wide) if ctx.needs_input_grad[3] else None
            grad_rows = None if own is None else torch.zeros_like(own, dtype=wide)
            total = torch.zeros((), dtype=wide, device=hidden.device)
            for taken, delta, parts in _slices(hidden, head):
                for part in parts:
                    total += _differentiate(part, targets_N[part.tokens, None], head, grad_bias)
                here = hidden[taken]
                if own is None or index_K is None or grad_rows is None:
                    torch.mm(delta, weight, out=grad_hidden[taken])
                else:
                    columns = delta[:, index_K]     # these belong to the trained rows
                    delta.index_fill_(1, index_K, 0.0)
                    _add_product(grad_rows, columns.T, here)
                    torch.addmm(columns @ own, delta, weight, out=grad_hidden[taken])
                if grad_weight is not None:
                    _add_product(grad_weight, delta.T, here)
        ctx.save_for_backward(grad_hidden.to(hidden_ND.dtype), grad_weight, grad_bias, grad_rows)
        ctx.dtypes = [None if part is None else part.dtype for part in (weight_VD, bias_V, rows_KD)]
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grad_head = ctx.saved_tensors
        weight, bias, rows = (None if part is None else (part * grad).to(dtype)
                              for part, dtype in zip(grad_head, ctx.dtypes, strict=True))
        return grad_hidden * grad.to(grad_hidden.dtype), None, weight, bias, None, None, None, rows


def _differentiate(part: Part, targets: Tensor, head: Head, grad_bias: Tensor | None) -> Tensor:
    """() loss of the part; its logits become d loss / d (hidden @ weight.T)."""
    delta = part.logits
    kernel = _kernel(delta.device) if delta.is_cuda and part.half is not None and grad_bias is None else None
    if kernel is not None and part.half is not None:
        if head.bias_V is not None:
            delta += head.bias_V
        return kernel(delta, targets, part.half, head.factor, head.cap).sum()
    slope = adjust(delta, head)
    wanted, largest = delta.gather(1, targets), delta.amax(1)
    losses = _log_sum(delta, largest)[:, None] - wanted     # the target's probability may be 0 in float32
    delta.scatter_add_(1, targets, torch.full_like(wanted, -1.0))
    if slope is not None:
        delta *= slope
    if head.factor != 1.0:
        delta *= head.factor
    if grad_bias is not None:
        grad_bias += delta.sum(0)
    if part.half is not None:
        part.half.copy_(delta)
    return losses.sum()


def _log_sum(logits: Tensor, largest: Tensor) -> Tensor:
    """(n,) float64 log of the sum of exponentials; the logits become probabilities.

    It uses torch's softmax, whose exponential takes half the time of torch.exp: the largest probability is 1 / sum.
    """
    likeliest = torch.softmax(logits, 1, out=logits).amax(1)
    return largest.double() - likeliest.double().log()


@cache
def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The Triton kernel, after a test on this device, where it is compiled (which needs a C compiler)."""
    try:
        from lit_llm.kernels import cross_entropy_triton as kernels

        kernels.differentiate(torch.zeros(1, 8, device=device), torch.zeros(1, 1, dtype=torch.int64, device=device),
                              torch.empty(1, 8, dtype=torch.bfloat16, device=device), 1.0, None)
    except Exception as error:                      # not installed, no compiler, unsupported GPU: many error types
        log.warning("Triton does not work here, so the loss uses slower torch operations (%s)",
                    " ".join(str(error).split())[:200])
        return None
    return kernels.differentiate
