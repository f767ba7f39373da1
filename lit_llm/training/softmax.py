"""Products of hidden states with a head's weight, and what becomes of a chunk of logits: losses and their gradient.

Chooses how, by device. On CUDA products leave in the float32 that they were summed in, and a Triton kernel in
`kernels.py` makes the rest in one pass; elsewhere, and where Triton does not work, torch's operations do. Both are
exact and give the same bits every time. So neither cut-cross-entropy nor Liger is asked, though both are quick:

    cut-cross-entropy 25.1.1    sums gradients over the vocabulary in bfloat16, in the order in which its programs end,
                                so a resumed run would differ; it is fast by leaving small gradients out
    Liger 0.8.5                 rounds logits to bfloat16 and waits for the device twice a micro-batch; cuts a batch
                                into V / D chunks, however narrow; cannot let single rows of a frozen head learn

Knows nothing of batches, heads or autograd.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

log = logging.getLogger(__name__)
HALVES = (torch.float16, torch.bfloat16)
Softmax = Callable[[Tensor, Tensor, float, float | None, torch.dtype], tuple[Tensor, Tensor]]


def product(left: Tensor, right: Tensor, wide: torch.dtype) -> Tensor:
    """`left @ right` in `wide`; on CUDA without rounding it to half precision in between."""
    return torch.mm(left, right, out_dtype=wide) if _keeps_sums(left) else (left @ right).to(wide)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, where total is float32 or wider; on CUDA within the product, without a copy of it."""
    if _keeps_sums(left):
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def _keeps_sums(left: Tensor) -> bool:
    """Whether a product of halves can be had as float32: on Nvidia's GPUs since Ampere."""
    return (left.is_cuda and left.dtype in HALVES and torch.version.hip is None
            and torch.cuda.get_device_capability(left.device) >= (8, 0))


def losses_and_gradient(logits_NV: Tensor, targets_N: Tensor, factor: float, cap: float | None,
                        dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses of rows, and the gradient of their sum; the logits are used up.

        z = cap * tanh(factor * logits / cap), or factor * logits without a cap
        d loss / d logits = (softmax(z) - onehot(target)) * (1 - tanh ** 2) * factor

    Args:
        logits_NV: (N, V) float32 or float64, as the head gives them.
        targets_N: (N,) int64, each in [0, V).
        factor: Multiplies logits.
        cap: Squashes them softly.
        dtype: Of the gradient; the losses come in the dtype of the logits.
    """
    made = _kernel(logits_NV.device) if logits_NV.is_cuda and logits_NV.dtype == torch.float32 else None
    return (made or _by_torch)(logits_NV, targets_N, factor, cap, dtype)


def _by_torch(logits: Tensor, targets: Tensor, factor: float, cap: float | None, dtype: torch.dtype
              ) -> tuple[Tensor, Tensor]:
    """With torch's operations, in the memory of the logits."""
    slope = None
    if cap is not None:
        logits = logits.mul_(factor / cap).tanh_()
        slope = 1 - logits * logits
        logits *= cap
    elif factor != 1.0:
        logits *= factor
    lse = logits.logsumexp(-1)
    losses = lse - logits.gather(1, targets[:, None])[:, 0]
    delta = logits.sub_(lse[:, None]).exp_()
    delta.scatter_add_(1, targets[:, None], torch.full_like(delta[:, :1], -1.0))
    if slope is not None:
        delta *= slope
    if factor != 1.0:
        delta *= factor
    return losses, delta.to(dtype)


@cache
def _kernel(device: torch.device) -> Softmax | None:
    """The Triton kernel, once it has done a row on this device; there it is compiled, which takes a C compiler."""
    try:
        from lit_llm.training import kernels

        kernels.losses_and_gradient(torch.zeros(1, 8, device=device), torch.zeros(1, dtype=torch.int64, device=device),
                                    1.0, None, torch.bfloat16)
    except Exception as error:                      # not installed, no compiler, a GPU too old: each in its own way
        log.warning("the loss falls back to torch's operations, which are slower: Triton does not work here (%s)",
                    " ".join(str(error).split())[:200])
        return None
    return kernels.losses_and_gradient
