"""Compute the load-balancing loss of a mixture-of-experts model per document.

transformers adds this loss only if `output_router_logits` is set, and computes it over the tokens of a micro-batch, so
that another division of the same step gives another loss. Here the unit is the document:

    loss of a step = coefficient * sum over its documents of (tokens of the document / tokens of the step) * balance

where `balance` is computed by the function of the model's own class (`load_balancing_loss_func` of its module:
equations 4 to 6 of arXiv:2101.03961, over all layers) for the router logits of this document only. Documents without a
supervised token and padding are left out. So the loss is independent of micro-batches, processes and packing.
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
PASSED = {"gate_logits", "num_experts", "top_k", "attention_mask", "num_keys"}


def coefficient(model: Any, wanted: float | None) -> float:
    """The coefficient of the loss; 0 if there is none.

    Args:
        model: A causal LM, adapters or not.
        wanted: Value of `model.router_aux_loss`; null uses the model's config.

    Raises:
        InputError: A number above 0 for a model without such a loss.
    """
    inner = anatomy.causal_lm(model)
    declared = next((getattr(inner, name) for name in COEFFICIENTS if getattr(inner, name, None) is not None), None)
    if declared is None or _loss_function(inner) is None or not _has_routers(inner):
        if wanted:
            raise InputError(f"{type(inner).__name__} has no load-balancing loss",
                             where="model.router_aux_loss", fix="set it to null")
        return 0.0
    return float(declared if wanted is None else wanted)


def _has_routers(inner: Any) -> bool:
    """Whether transformers records router logits of a layer; some configs have a coefficient without experts."""
    recorders = transformers_private.recorded_outputs(anatomy.backbone(inner)).get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    kinds: tuple[Any, ...] = tuple(getattr(recorder, "target_class", recorder) for recorder in recorders)
    return any(isinstance(layer, kinds) for layer in inner.modules())


def _loss_function(inner: Any) -> Callable[..., Any] | None:
    """The loss function of the model's class; None if there is none, or it needs unknown arguments."""
    function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if function is None:                            # FSDP2 derives a class from the model's
        modules = (sys.modules[kind.__module__] for kind in type(inner).__mro__)
        candidates = (getattr(module, "load_balancing_loss_func", None) for module in modules)
        function = next((candidate for candidate in candidates if candidate is not None), None)
    if function is None:
        return None
    parameters = signature(function).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is Parameter.empty}
    return function if needed <= PASSED else None


def balance_sum(model: Any, router_logits: Sequence[Tensor], labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Sum of tokens times balance over documents with a supervised token, with a gradient.

    Args:
        model: A causal LM whose `coefficient` is not 0.
        router_logits: Router logits of each layer, (T, E) or (1, T, E).
        labels: (T,) unshifted.
        cu_seqlens: (documents + 1,) document boundaries; null for one document.

    Raises:
        InputError: The model returned no router logits.
    """
    inner: Any = anatomy.causal_lm(model)
    function = _loss_function(inner)
    assert function is not None
    if not router_logits:
        raise InputError(f"{type(inner).__name__} returns no router logits (compiled layers hide them)",
                         where="model.router_aux_loss", fix="set it to 0, or --model.compile false")
    layers = [logits.reshape(-1, logits.shape[-1]) for logits in router_logits]
    more: dict[str, Any] = {"num_experts": inner.num_experts, "top_k": inner.num_experts_per_tok}
    if "num_keys" in signature(function).parameters:    # Doge selects experts by pairs of keys
        more["num_keys"] = math.floor(math.sqrt(inner.num_experts))
    ends = cu_seqlens.tolist() if cu_seqlens is not None else [0, len(labels)]
    total = layers[0].sum().float() * 0.0                       # a graph on every rank
    for start, stop in pairwise(ends):
        if bool((labels[start:stop] != IGNORE_INDEX).any()):
            parts = tuple(_of_document(layer, start, stop, len(labels)) for layer in layers)
            total = total + function(parts, **more) * (stop - start)
    return total


def _of_document(layer: Tensor, start: int, stop: int, tokens: int) -> Tensor:
    """A document's rows of a layer's logits; Doge has several per token, one for each set of keys."""
    rows_per_token = len(layer) // tokens
    return layer[start * rows_per_token:stop * rows_per_token]


def merged(parts: list[Tensor]) -> Tensor | None:
    """The sum over documents that were processed one by one; None if it was not requested."""
    return torch.stack(parts).sum() if parts else None
