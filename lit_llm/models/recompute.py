"""Reduce the memory of a model's forward pass by recomputing activations in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

Recompute = Literal["none", "selective", "full"]
WAYS: tuple[Recompute, ...] = ("none", "selective", "full")        # what costs least time first


def of_config(value: bool | Literal["selective"]) -> Recompute:
    """What `gradient_checkpointing` means, but for `auto`."""
    return "selective" if value == "selective" else "full" if value else "none"


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

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _kept())
    # the second is its name before transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)
    if any(hasattr(model, name) for name in ("_require_grads_hook", "_require_grads_hooks")):
        model.disable_input_require_grads()         # for reentry alone; here a frozen embedding needs no gradient


def _kept() -> Callable[..., Any]:
    """Of operations within a layer, those whose results stay: products of matrices, and attention on CPU and CUDA.

    Not the second product of an adapter, which makes many numbers of few: it costs little and gives as much as the
    layer itself.
    """
    from torch.nn.attention import varlen  # registers its operation
    from torch.utils.checkpoint import CheckpointPolicy

    assert varlen
    aten = torch.ops.aten
    products = {aten.mm.default: 0, aten.addmm.default: 1}      # the place of the left matrix among its arguments
    attentions = {torch.ops.lit_llm.causal_attention.default, torch.ops.torch_attn._varlen_attn.default,
                  aten._scaled_dot_product_flash_attention_for_cpu.default,
                  aten._scaled_dot_product_flash_attention.default,
                  aten._scaled_dot_product_efficient_attention.default,
                  aten._scaled_dot_product_cudnn_attention.default}

    def policy(_: Any, function: Any, *args: Any, **__: Any) -> CheckpointPolicy:
        keep = function in attentions
        if function in products:
            left, right = args[products[function]:][:2]
            keep = 8 * left.shape[1] >= right.shape[1]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
