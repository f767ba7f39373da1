"""A Triton kernel that computes losses and the gradient of logits from logits and targets in one pass.

The home of triton, which torch's CUDA builds bring along; imported only where `cross_entropy.py` uses it. The same code
runs on CPU tensors under TRITON_INTERPRET=1, which is how it is tested without a GPU. It is exact, and gives the same
bits every time. What cut-cross-entropy and Liger lack of that, and how to use them nevertheless, is in `borrowed.py`.
What it gains over torch's operations on a GPU is not measured.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 16                             # logits in registers at a time, 16 to a thread


def differentiate(logits_NV: Tensor, targets: Tensor, delta_NV: Tensor, factor: float, cap: float | None) -> Tensor:
    """Compute (N,) float32 losses of rows; the gradient of their sum is written to `delta_NV`.

        z = cap * tanh(factor * logits / cap), or factor * logits without a cap
        delta = (softmax(z) - onehot(target)) * (1 - tanh ** 2) * factor

    Torch's own operations read and write float32 logits about ten times, which takes longer than the matrix products
    around them; here they are read twice, and their gradient is written once, already rounded. One program per row,
    without atomics.

    Args:
        logits_NV: float32 logits; they are not changed.
        targets: (N,) or (N, 1) int64, each in [0, V).
        delta_NV: Output of any precision, in separate memory.
        factor: Multiplies logits.
        cap: Soft cap of the logits.
    """
    count, columns = logits_NV.shape
    losses_N = torch.empty(count, dtype=torch.float32, device=logits_NV.device)
    with torch.cuda.device_of(logits_NV):           # Triton launches on whatever device is the current one
        _rows[(count,)](logits_NV, targets.contiguous(), losses_N, delta_NV, logits_NV.stride(0), delta_NV.stride(0),
                        float(factor), 0.0 if cap is None else float(cap), columns=columns, capped=cap is not None,
                        size=min(BLOCK, triton.next_power_of_2(columns)), num_warps=WARPS)
    return losses_N


# triton.jit accepts no type annotations except its own.

@triton.jit
def _adjusted(logits, factor, cap, capped: tl.constexpr):  # type: ignore[no-untyped-def]
    """(z, tanh): factor * logits, softly capped; tanh is 0 without a cap."""
    z = logits * factor
    squashed = z * 0.0
    if capped:
        squashed = 2.0 * tl.sigmoid(2.0 * (z / cap)) - 1.0      # tanh, which Triton has no name for
        z = squashed * cap
    return z, squashed


@triton.jit
def _rows(logits_ptr, targets_ptr, losses_ptr, delta_ptr, logits_stride, delta_stride,  # type: ignore[no-untyped-def]
          factor, cap, columns: tl.constexpr, capped: tl.constexpr, size: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)             # rows times columns may pass 2^31
    logits_ptr += row * logits_stride
    delta_ptr += row * delta_stride
    target = tl.load(targets_ptr + row)
    within = tl.arange(0, size)

    highest = float("-inf")                         # the running maximum, and the sum of exponentials below it
    total = 0.0
    for start in range(0, columns, size):
        inside = start + within < columns
        z, _ = _adjusted(tl.load(logits_ptr + start + within, mask=inside, other=0.0), factor, cap, capped)
        z = tl.where(inside, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    normalizer = highest + tl.log(total)

    at_target, _ = _adjusted(tl.load(logits_ptr + target), factor, cap, capped)
    tl.store(losses_ptr + row, normalizer - at_target)
    for start in range(0, columns, size):
        at = start + within
        z, squashed = _adjusted(tl.load(logits_ptr + at, mask=at < columns, other=0.0), factor, cap, capped)
        delta = (tl.exp(z - normalizer) - tl.where(at == target, 1.0, 0.0)) * factor
        if capped:
            delta *= 1.0 - squashed * squashed
        tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=at < columns)
