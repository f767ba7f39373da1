"""Access to weights and gradients that a strategy may have sharded over processes, independent of the strategy.

DDP replicates every weight. ZeRO 1 and 2 shard the float32 masters of trained weights, beside the weights of the
forward pass; ZeRO-3 also shards the weights and leaves empty tensors in their place (`ds_id` and other attributes of
DeepSpeed). FSDP2 replaces weights and gradients by DTensors. No other module depends on these representations.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.system.private import deepspeed as deepspeed_private

# ---- one weight ------------------------------------------------------------------------------------------------------

def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has sharded it: then it is empty except during a call of its module."""
    return hasattr(weight, "ds_id")


def shape_of(weight: Tensor) -> torch.Size:
    """Shape of the whole weight; the tensor of a weight that ZeRO-3 has sharded is empty."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def elements_of(weight: Tensor) -> int:
    """Number of elements of the whole weight."""
    return shape_of(weight).numel()


def own_part(weight: Tensor) -> Tensor:
    """The elements that this process keeps, detached; all of them if the weight is not sharded."""
    part: Any = getattr(weight, "ds_tensor", weight)
    part = part.to_local() if hasattr(part, "to_local") else part       # a DTensor
    return part.detach()


def whole(weight: Tensor) -> Tensor:
    """The full weight, from DeepSpeed's float32 master if there is one. Collective if the weight is sharded."""
    if is_partitioned(weight) and not deepspeed_private.is_stepped(weight):      # stage 3 without an optimizer
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().clone()
    if _has_master(weight):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)
    return _full(weight)


def gradient(weight: Tensor) -> Tensor | None:
    """The full gradient before the optimizer uses it; None if there is none. Collective if it is sharded."""
    if _has_master(weight):
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(weight)
    return None if weight.grad is None else _full(weight.grad)


def _has_master(weight: Tensor) -> bool:
    """Whether DeepSpeed's optimizer keeps a float32 copy of it, whole or sharded."""
    return is_partitioned(weight) or deepspeed_private.has_master(weight)


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor       # a DTensor


# ---- all weights -----------------------------------------------------------------------------------------------------

def gathered_trainable_state(module: nn.Module) -> dict[str, Tensor] | None:
    """All trained weights, unsharded, on the CPU of rank 0; None on other ranks. Collective under every strategy.

    DeepSpeed's float32 masters are used if there are any, because bfloat16 weights are rounded. Weights are gathered on
    the device one at a time.

    Args:
        module: The LightningModule or any part of it; its parameter names are the keys. Tied weights appear once.

    Returns:
        Name -> contiguous tensor, a copy that later steps do not change.
    """
    import torch.distributed as dist

    keep = not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0
    state = _gathered(module, whole, keep=keep)
    return state if keep else None


def gathered_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Unsharded gradients of a step on the CPU of every rank, before the optimizer uses them. Collective."""
    return _gathered(module, gradient, keep=True)


def _gathered(module: nn.Module, gather: Callable[[Tensor], Tensor | None], *, keep: bool) -> dict[str, Tensor]:
    """The result of `gather` for each trained weight, by name; empty if results are not kept."""
    tensors = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            tensor = gather(weight)
            if keep and tensor is not None:
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def gradient_norm(weights: Iterable[nn.Parameter]) -> Tensor:
    """() norm of the gradients of all weights together, over all ranks; 0 if there are no gradients.

    The norm is inf or nan if any gradient is, or if the square of one exceeds float32 (beyond about 1e19). Not for
    DeepSpeed, whose engine has the gradients. Collective if weights are sharded.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    return _full(nn.utils.get_total_norm(gradients)) if gradients else torch.zeros(())


def clip(weights: Iterable[nn.Parameter], limit: float, norm: Tensor | None) -> None:
    """Scale the gradients so that the norm of all of them is at most `limit`.

    Args:
        weights: The trained weights; those without a gradient are left out.
        limit: Upper limit of the norm.
        norm: Result of `gradient_norm`; if null, or if gradients are sharded, the norm is computed here.
    """
    with_gradient = [weight for weight in weights if weight.grad is not None]
    if norm is None or any(hasattr(weight.grad, "full_tensor") for weight in with_gradient):
        nn.utils.clip_grad_norm_(with_gradient, limit, foreach=True)
    else:
        nn.utils.clip_grads_with_norm_(with_gradient, limit, norm, foreach=True)
