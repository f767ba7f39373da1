"""Gather whole weights from a model whose weights are sharded over processes.

ZeRO keeps float32 masters apart from what computes and cuts either; FSDP2's weights are DTensors.
"""

from torch import Tensor, nn


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
    state = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            gathered = whole(weight)
            if keep:
                state[name] = gathered.detach().to("cpu", copy=True).contiguous()
    return state if keep else None


def whole(weight: nn.Parameter) -> Tensor:
    """The full tensor behind a parameter that ZeRO or FSDP2 may have cut or cast; a collective where it is cut."""
    if hasattr(weight, "full_tensor"):              # FSDP2's DTensor
        return weight.full_tensor()
    if hasattr(weight, "ds_id") and not hasattr(weight, "_z3_optimizer"):      # stage 3 without an optimizer
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([weight]):
            return weight.detach().clone()
    if hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(weight)
    return weight
