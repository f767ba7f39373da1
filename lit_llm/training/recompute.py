"""A model in, the same model with less memory in its forward pass out: activations are computed again when needed.

Knows nothing of devices, data or losses; `model.activation_bytes` says what each way keeps.
"""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lit_llm.model import activation_bytes, causal_lm

MARGIN = 0.85                                       # of a device's memory; fragments, buffers and others have the rest
Recompute = Literal["none", "selective", "full"]


def apply(model: Any, recompute: Recompute) -> None:
    """Turn recomputing on, layer by layer.

    Without reentry, so that adapters get gradients though no input of theirs has one, and hooks of ZeRO-3 and FSDP2
    gather weights again where they are used again.

    Args:
        model: A transformers model.
        recompute: `full` keeps the input of each layer alone; `selective` also the products of matrices and the
            attention, which cost nearly all of the time, and computes norms, rotations and activations again.
    """
    if recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _dear())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    if any(hasattr(model, name) for name in ("_require_grads_hook", "_require_grads_hooks")):
        model.disable_input_require_grads()         # for reentry alone; here a frozen embedding needs no gradient


def cheapest(model: Any, tokens: int, *, room: int, half: bool) -> Recompute:
    """The way that computes least again and still fits.

    Weights and what learning them needs (gradient, two averages, a master) are counted whole, as if nothing were
    split over devices.

    Args:
        model: With its adapters, if any.
        tokens: Of a micro-batch on one device.
        room: Bytes of the device.
        half: Whether matrices are multiplied in two bytes.
    """
    fixed = sum(getattr(weight, "ds_numel", weight.numel()) * (16 if weight.requires_grad else weight.element_size())
                for weight in model.parameters())
    ways: list[Recompute] = ["none", "selective"]
    for way in ways:
        if fixed + activation_bytes(causal_lm(model).config, tokens, half=half, recompute=way) < room:
            return way
    return "full"


def room(device: torch.device) -> int:
    """Bytes of a device that a run may fill."""
    if device.type == "cuda":
        return int(MARGIN * torch.cuda.get_device_properties(device).total_memory)
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):             # a container may have less; there is none, or it says "max"
        have = min(have, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return int(MARGIN * have)


def _dear() -> list[Any]:
    """Operations whose results are kept: matrix products, and attention as CPU and CUDA have it."""
    from torch.nn.attention import varlen  # registers its operation

    aten = torch.ops.aten
    kept = [aten.mm.default, aten.addmm.default, torch.ops.lit_llm.causal_attention.default,
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default]
    assert varlen
    return [*kept, torch.ops.torch_attn._varlen_attn.default]
