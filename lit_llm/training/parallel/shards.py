"""The one module that knows how a weight is split over processes.

DDP keeps every weight whole. ZeRO 1 and 2 keep float32 masters of what is trained in pieces, beside the weights of the
forward pass; ZeRO-3 splits the weights as well and leaves empty tensors in their place (`ds_id` and other attributes
of DeepSpeed). FSDP2 replaces weights and gradients by DTensors. The functions here answer alike for all of them.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.system.private import deepspeed as deepspeed_private

# ---- one weight ------------------------------------------------------------------------------------------------------

def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has split it: it is empty except around a call of the module that it belongs to."""
    return hasattr(weight, "ds_id")


def shape_of(weight: Tensor) -> torch.Size:
    """Shape of the whole weight; the tensor of a weight that ZeRO-3 has split is empty."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def elements_of(weight: Tensor) -> int:
    """Number of elements of the whole weight."""
    return shape_of(weight).numel()


def own_part(weight: Tensor) -> Tensor:
    """The elements that this process keeps, without their gradient graph; all of them where nothing is split."""
    part: Any = getattr(weight, "ds_tensor", weight)
    part = part.to_local() if hasattr(part, "to_local") else part       # a DTensor
    return part.detach()


def whole(weight: Tensor) -> Tensor:
    """The full weight, of the float32 master where DeepSpeed has one. A collective where the weight is split."""
    if is_partitioned(weight) and not deepspeed_private.is_stepped(weight):      # stage 3 without an optimizer
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().clone()
    if _has_master(weight):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)
    return _full(weight)


def gradient(weight: Tensor) -> Tensor | None:
    """The full gradient before the optimizer reads it; None where there is none. A collective where it is split."""
    if _has_master(weight):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(weight)
    return None if weight.grad is None else _full(weight.grad)


def _has_master(weight: Tensor) -> bool:
    """Whether DeepSpeed's optimizer keeps a float32 copy of it, whole or in pieces."""
    return is_partitioned(weight) or deepspeed_private.has_master(weight)


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor       # a DTensor


# ---- all weights -----------------------------------------------------------------------------------------------------

def gathered_trainable_state(module: nn.Module) -> dict[str, Tensor] | None:
    """All trained weights, whole, on the CPU of rank 0; None elsewhere.

    A collective under every strategy: all ranks call it, at the same place. Float32 masters where DeepSpeed has them,
    since bfloat16 weights hold less than was learned. One weight at a time is gathered on the device.

    Args:
        module: The LightningModule or any part of it; its parameter names are the keys. Tied weights appear once.

    Returns:
        Copies that later steps do not touch: name -> contiguous tensor.
    """
    import torch.distributed as dist

    keep = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    state = _gathered(module, whole, keep=keep)
    return state if keep else None


def gathered_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Whole gradients of a step on the CPU of every rank, before the optimizer reads them. A collective."""
    return _gathered(module, gradient, keep=True)


def _gathered(module: nn.Module, gather: Callable[[Tensor], Tensor | None], *, keep: bool) -> dict[str, Tensor]:
    """What `gather` gives for each trained weight, by name; empty where it is not kept."""
    found = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            tensor = gather(weight)
            if keep and tensor is not None:
                found[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


def gradient_norm(weights: Iterable[nn.Parameter]) -> Tensor:
    """() norm of the gradients of all weights together, over all ranks where they are split; 0 where there is none.

    The norm is inf or nan if any gradient is, or if the square of one exceeds float32 (beyond about 1e19). Not for
    DeepSpeed, whose engine has the gradients. A collective where weights are split.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return _full(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())


def clip(weights: Iterable[nn.Parameter], limit: float, norm: Tensor | None) -> None:
    """Scale the gradients so that the norm of all of them is at most `limit`.

    Args:
        weights: Those without a gradient are left out.
        limit: Upper limit of the norm.
        norm: What `gradient_norm` gave; null, and gradients that are split, measure it here.
    """
    learned = [weight for weight in weights if weight.grad is not None]
    if norm is None or any(hasattr(weight.grad, "full_tensor") for weight in learned):
        nn.utils.clip_grad_norm_(learned, limit, foreach=True)
    else:
        nn.utils.clip_grads_with_norm_(learned, limit, norm, foreach=True)
