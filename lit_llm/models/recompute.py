"""Gradient checkpointing: save memory by recomputing activations in the backward pass."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from lit_llm.system.private import torch as torch_private

Recompute = Literal["none", "selective", "full"]
WAYS: tuple[Recompute, ...] = ("none", "selective", "full")        # in order of additional time


def of_config(value: bool | Literal["selective"]) -> Recompute:
    """The mode for a value of `gradient_checkpointing` other than `auto`."""
    return "selective" if value == "selective" else "full" if value else "none"


def apply(model: Any, recompute: Recompute) -> None:
    """Enable recomputation for each layer.

    It is not reentrant, so that adapters get gradients although their inputs need none, and that hooks of ZeRO-3 and
    FSDP2 gather weights again where they are used again.

    Args:
        model: A transformers model.
        recompute: `full` saves only the input of each layer; `selective` also saves the results of matrix products and
            attention, which take nearly all of the time, and recomputes norms, rotary embeddings and activations.
    """
    if recompute == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if recompute == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _saving_policy())
    # the second name is that before transformers 5.23
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)
    if any(hasattr(model, name) for name in ("_require_grads_hook", "_require_grads_hooks")):
        model.disable_input_require_grads()         # needed by reentrant checkpointing only


def _saving_policy() -> Callable[..., Any]:
    """A policy that saves the results of matrix products, and of attention on CPU and CUDA.

    It does not save an adapter's second product, whose output is as large as the layer's own but cheap to compute.
    layer itself.
    """
    from torch.nn.attention import varlen  # registers its operator
    from torch.utils.checkpoint import CheckpointPolicy

    assert varlen
    aten = torch.ops.aten
    products = {aten.mm.default: 0, aten.addmm.default: 1}      # position of the left matrix among the arguments
    attentions = {torch.ops.lit_llm.causal_attention.default, *torch_private.attention_operations()}

    def policy(_: object, function: object, *args: Any, **__: Any) -> CheckpointPolicy:
        keep = function in attentions
        if function in products:
            left, right = args[products[function]:][:2]
            keep = 8 * left.shape[1] >= right.shape[1]
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
