"""Merge the adapters of a causal language model into a plain model that computes the same.

PEFT adds each adapter to the weight of its layer. That changes the model where two layers share the weight: with LoRA
on the embedding of a tied base, training applies the adapter to the embedding only, but merging would also change the
output head.
"""

from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_llm.errors import InputError
from lit_llm.models.adapters.adapter import is_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME = 1e-6                                         # relative to the largest weight: difference due to rounding
IDS = 1 << 14                                       # embedding rows that are computed at a time


class UnmergeableError(InputError):
    """The method's adapters cannot be merged into the base's weights."""

    def __init__(self, why: str = "") -> None:
        super().__init__(f"this PEFT method cannot be merged into the base{why}", where="model.peft",
                         fix="export --adapter writes the adapter alone, which peft.PeftModel.from_pretrained loads")


def merge(model: Any) -> "PreTrainedModel":
    """Merge the adapters into the base; a model without adapters is returned unchanged.

    The merged model computes the same as in training. If the adapters made the two layers of a tied weight differ, the
    returned model is untied: two matrices, and `tie_word_embeddings: false` in its config.

    Args:
        model: A model with adapters; it is changed in place.

    Raises:
        UnmergeableError: The method cannot be merged.
    """
    if not is_peft(model):
        return model
    if not hasattr(model, "merge_and_unload"):
        raise UnmergeableError()
    inner = model.get_base_model()
    was_tied = _declares_tied(inner)
    _untie_adapted(inner)
    tables = _scaled_tables(inner)
    _merge_rows_below(inner)
    _declare_tied(inner, False)                     # otherwise PEFT warns about what was just prevented
    try:
        merged: PreTrainedModel = model.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise UnmergeableError(f": {str(error).splitlines()[0][:200]}") from None
    for name, rows in tables.items():
        merged.get_submodule(name).weight.data = rows
    if was_tied:
        _declare_tied(merged, _tie_equal(merged))
    return merged


def _untie_adapted(inner: nn.Module) -> None:
    """Copy the weight of each adapted layer that shares it with another layer."""
    owners: dict[int, list[tuple[str, nn.Module, str]]] = defaultdict(list)
    for name, module in inner.named_modules():
        for key, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(weight)].append((name, module, key))
    for places in owners.values():
        if len(places) > 1 and any("base_layer" in name.split(".") for name, *_ in places):
            for _, module, key in places[1:]:
                module.register_parameter(key, nn.Parameter(module.get_parameter(key).detach().clone(), False))


def _merge_rows_below(inner: nn.Module) -> None:
    """Merge trained token rows below another adapter of the same layer, which PEFT would leave out."""
    for layer in list(inner.modules()):
        rows = getattr(getattr(layer, "base_layer", None), "token_adapter", None)
        if rows is not None:
            rows.merge()
            layer.base_layer = rows.base_layer


def _scaled_tables(inner: nn.Module) -> dict[str, Tensor]:
    """Merged rows of adapted embeddings that scale their output, as Gemma's do: name -> (V, D).

    Some PEFT methods scale the sum of row and adapter, some only the row, but all merge in the same way. The output of
    the layer for each id shows which one applies.
    """
    tables = {}
    for name, layer in inner.named_modules():
        base = getattr(layer, "base_layer", None)
        scale = getattr(base, "embed_scale", None)
        inside = {"base_layer", "token_adapter"} & set(name.split("."))     # trained token rows merge unchanged
        if isinstance(base, nn.Embedding) and scale is not None and not inside:
            ids = torch.arange(base.num_embeddings, device=base.weight.device)
            with torch.no_grad():
                rows = [layer(part[None])[0] / scale for part in ids.split(IDS)]
            tables[name] = torch.cat(rows).to(base.weight.dtype)
    return tables


def _tie_equal(merged: "PreTrainedModel") -> bool:
    """Tie embedding and head again if they are equal; return whether they are tied."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    if head is None or not isinstance(embedding.weight, Tensor) or embedding.weight.shape != head.weight.shape:
        return False
    if head.weight is embedding.weight:
        return True
    most = max((one - other).abs().max() for one, other in zip(
        embedding.weight.detach().split(IDS), head.weight.detach().split(IDS), strict=True))
    if most > SAME * embedding.weight.detach().abs().max():
        return False
    head.weight = embedding.weight
    return True


def _declares_tied(inner: Any) -> bool:
    configs = inner.config, inner.config.get_text_config()
    return any(getattr(config, "tie_word_embeddings", False) for config in configs)


def _declare_tied(inner: Any, tied: bool) -> None:
    """Set `tie_word_embeddings` in every config that has it."""
    for config in {id(config): config for config in (inner.config, inner.config.get_text_config())}.values():
        with suppress(AttributeError):              # some configs compute it
            config.tie_word_embeddings = tied
