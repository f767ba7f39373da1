"""Compute the load-balancing loss of a mixture-of-experts model for the documents of a micro-batch.

transformers adds this loss only where `output_router_logits` is set, and computes it over whatever happens to lie in
one micro-batch, so that another division of the same step is another loss. Here the unit is the document:

    loss of a step = coefficient * sum over its documents of (tokens of the document / tokens of the step) * balance

where `balance` is what the model's own class computes (`load_balancing_loss_func` of its module: equations 4 to 6 of
arXiv:2101.03961, over all layers) for the router logits of this document alone. Documents without a supervised token
have no part, nor has padding. So neither micro-batches, nor processes, nor packing change it.
"""

import math
import sys
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_llm.errors import InputError
from lit_llm.models import anatomy
from lit_llm.system.private import transformers as transformers_private
from lit_llm.text.tokenizer import IGNORE_INDEX

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")    # attributes of causal LMs; the second is JetMoe's
GIVEN = {"gate_logits", "num_experts", "top_k", "attention_mask", "num_keys"}


def coefficient(model: Any, wanted: float | None) -> float:
    """What the balance is multiplied by; 0 where there is none.

    Args:
        model: A causal LM, adapters or not.
        wanted: `model.router_aux_loss`: null is what the model's config declares.

    Raises:
        InputError: A number above 0 for a model whose class computes no such loss.
    """
    inner = anatomy.causal_lm(model)
    declared = next((getattr(inner, name) for name in COEFFICIENTS if getattr(inner, name, None) is not None), None)
    if declared is None or _function(inner) is None or not _has_routers(inner):
        if wanted:
            raise InputError(f"{type(inner).__name__} has no load-balancing loss of routers",
                             where="model.router_aux_loss", fix="set it to null")
        return 0.0
    return float(declared if wanted is None else wanted)


def _has_routers(inner: Any) -> bool:
    """Whether it has a layer whose router logits transformers records: some declare a coefficient without experts."""
    recorders = transformers_private.recorded_outputs(anatomy.backbone(inner)).get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    kinds: tuple[Any, ...] = tuple(getattr(each, "target_class", each) for each in recorders)
    return any(isinstance(layer, kinds) for layer in inner.modules())


def _function(inner: Any) -> Callable[..., Any] | None:
    """What the model's class calls; None where that is nothing, or wants more than is known here."""
    function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if function is None:                            # FSDP2 makes a class of its own below the model's
        modules = (sys.modules[kind.__module__] for kind in type(inner).__mro__)
        function = next((found for found in (getattr(module, "load_balancing_loss_func", None) for module in modules)
                         if found is not None), None)
    if function is None:
        return None
    needed = {name for name, each in signature(function).parameters.items() if each.default is Parameter.empty}
    return function if needed <= GIVEN else None


def balance_sum(model: Any, router_logits: Sequence[Tensor], labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum over documents with a supervised token of their tokens times their balance, with a gradient.

    Args:
        model: A causal LM whose `coefficient` is not 0.
        router_logits: Of each layer, (T, E) or (1, T, E).
        labels: (T,) unshifted.
        cu_seqlens: (documents + 1,) borders; null where there is one document.

    Raises:
        InputError: The model gave no router logits.
    """
    inner: Any = anatomy.causal_lm(model)
    function = _function(inner)
    assert function is not None
    if not router_logits:
        raise InputError(f"{type(inner).__name__} gives no router logits here (a compiled layer hides them)",
                         where="model.router_aux_loss", fix="set it to 0, or --model.compile false")
    layers = [logits.reshape(-1, logits.shape[-1]) for logits in router_logits]
    more: dict[str, Any] = {"num_experts": inner.num_experts, "top_k": inner.num_experts_per_tok}
    if "num_keys" in signature(function).parameters:    # Doge looks experts up by pairs of keys
        more["num_keys"] = math.floor(math.sqrt(inner.num_experts))
    ends = cu_seqlens.tolist() if cu_seqlens is not None else [0, len(labels)]
    total = layers[0].sum().float() * 0.0                       # a graph for every rank to walk
    for start, stop in pairwise(ends):
        if bool((labels[start:stop] != IGNORE_INDEX).any()):
            parts = tuple(_of_document(layer, start, stop, len(labels)) for layer in layers)
            total = total + function(parts, **more) * (stop - start)
    return total


def _of_document(layer: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    """A document's rows of a layer's logits, which may hold several for each token (Doge: one for each set of keys)."""
    each = len(layer) // tokens
    return layer[start * each:stop * each]


def merged(parts: list[Tensor]) -> Tensor | None:
    """The sum of what documents that went through the model one by one gave; None where none was asked for."""
    return torch.stack(parts).sum() if parts else None
