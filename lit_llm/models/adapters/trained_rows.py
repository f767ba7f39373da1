"""Train single rows of the embedding and the output head beside adapters, one row per token.

PEFT supports this but copies the whole matrix at each call; here the rows are used without a copy. This module also
tells whether a method can train such rows, and which ones an adapter folder contains.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_llm.errors import InputError
from lit_llm.models.adapters.peft_method import one_line, peft_config, stored_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """A frozen output head with some trained rows: `rows` (K, D) replace `layer.weight[index]`."""

    layer: nn.Linear
    index: Tensor
    rows: Tensor


def trained_rows(layer: nn.Module) -> TrainedRows | None:
    """The trained rows of an output head; None if it has none, or a different adapter.

    PEFT copies the whole matrix at each call to insert them; callers that know the rows can avoid the copy.
    """
    inner: Any = getattr(layer, "token_adapter", None)      # a TrainableTokensWrapper
    if inner is None or type(inner.base_layer) is not nn.Linear:
        return None
    if inner.merged or inner.disable_adapters or len(inner.active_adapters) != 1:
        return None
    name = inner.active_adapters[0]
    index = _on_device(tuple(inner.token_indices[name]), inner.base_layer.weight.device)
    return TrainedRows(inner.base_layer, index, inner.trainable_tokens_delta[name])


@lru_cache(maxsize=8)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy ids to the device once: each copy from pageable memory synchronizes with the device."""
    return torch.tensor(ids, device=device)


@lru_cache(maxsize=8)
def _places(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """(V,) index of each token of the vocabulary in `ids`; -1 if absent."""
    places = torch.full((vocabulary,), -1)
    places[list(ids)] = torch.arange(len(ids))
    return places.to(device)


def with_bias(layer: Any, hidden: Tensor) -> Tensor:
    """A head's logits with its bias, also where PEFT replaces rows of its matrix."""
    own: Tensor = type(layer).forward(layer, hidden)
    replaced = not (layer.merged or layer.disable_adapters or not layer.active_adapters)
    return own + layer.base_layer.bias if replaced else own


def embed(layer: Any, ids: Tensor) -> Tensor:
    """The same embeddings and gradients as PEFT's layer, without copying the matrix."""
    base = layer.base_layer
    if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1 or base.max_norm is not None:
        return type(layer).forward(layer, ids)
    name = layer.active_adapters[0]
    trained = tuple(layer.token_indices[name])
    place = _places(trained, base.num_embeddings, ids.device)[ids]
    padding = trained.index(base.padding_idx) if base.padding_idx in trained else None
    rows = F.embedding(place.clamp_min(0), layer.trainable_tokens_delta[name].to(base.weight.dtype), padding)
    return torch.where((place >= 0)[..., None], rows, base(ids))


def chooses_rows(model: "PreTrainedModel", spec: dict[str, Any]) -> bool:
    """Whether a spec itself trains vocabulary rows: those of some tokens, or an adapter on the whole layer."""
    config = peft_config(spec)
    if "trainable_token_indices" in (spec.get("init_args") or {}) or hasattr(config, "token_indices"):
        return True
    names = [_name(model, layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    aims = (getattr(config, "target_modules", None), getattr(config, "modules_to_save", None))
    return any(_hits(aim, name) for aim in aims for name in names)


def _hits(aim: str | Collection[str] | None, name: str) -> bool:
    """Match as PEFT does: a pattern, or suffixes of dotted names."""
    if isinstance(aim, str):
        return aim != "all-linear" and re.fullmatch(aim, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in aim or ())


def row_obstacle(model: "PreTrainedModel", spec: dict[str, Any]) -> str | None:
    """The reason why a method cannot train single token rows beside its adapters; None if it can."""
    config = peft_config(spec)
    if not hasattr(config, "trainable_token_indices"):
        return f"{type(config).__name__} cannot train single rows (LoRA can)"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "PEFT would drop the bias of this output head"
    return None


def stored_tokens(folder: Path) -> list[int]:
    """Ids whose rows were trained with the adapter in a folder in PEFT's format."""
    chosen = stored_keys(folder).get("trainable_token_indices")
    lists = chosen.values() if isinstance(chosen, dict) else [chosen or []]
    try:
        return sorted({int(id_) for ids in lists for id_ in ids})
    except (ValueError, TypeError) as error:
        raise InputError(f"trainable_token_indices is not a list of token ids: {one_line(error)}",
                         where=str(folder / "adapter_config.json")) from None


def token_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the embedding and, unless they are tied, of the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [_name(model, layer) for layer in layers]


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)
