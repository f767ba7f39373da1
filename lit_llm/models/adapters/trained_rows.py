"""Single rows of the embedding and of the output head that learn beside adapters, each the row of one token.

PEFT trains them, but copies the whole matrix at each call; here they are put in without a copy. Also says whether a
method can train such rows, and which ones an adapter's folder holds.
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
from lit_llm.models.adapters.peft_method import line, peft_config, stored_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """A frozen output head of which some rows learn: `rows` (K, D) stand in place of `layer.weight[index]`."""

    layer: nn.Linear
    index: Tensor
    rows: Tensor


def trained_rows(layer: nn.Module) -> TrainedRows | None:
    """The rows that learn in an output head; None where none do, or another thing is on it.

    PEFT copies the whole matrix at each call to put them in; who knows them can do without.
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
    """Copied there once: each copy from pageable memory is a wait for the device."""
    return torch.tensor(ids, device=device)


@lru_cache(maxsize=8)
def _places(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """(V,) where each token of the vocabulary stands in `ids`; -1 where it does not."""
    places = torch.full((vocabulary,), -1)
    places[list(ids)] = torch.arange(len(ids))
    return places.to(device)


def with_bias(layer: Any, hidden: Tensor) -> Tensor:
    """A head's logits, its bias included wherever peft replaces the rows of its matrix."""
    own: Tensor = type(layer).forward(layer, hidden)
    replaced = not (layer.merged or layer.disable_adapters or not layer.active_adapters)
    return own + layer.base_layer.bias if replaced else own


def embed(layer: Any, ids: Tensor) -> Tensor:
    """The same embeddings and the same gradient as peft's."""
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
    """Whether a spec itself says what learns of the vocabulary's rows: some tokens', or adapters on the whole layer."""
    config = peft_config(spec)
    if "trainable_token_indices" in (spec.get("init_args") or {}) or hasattr(config, "token_indices"):
        return True
    names = [_name(model, layer) for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    aims = (getattr(config, "target_modules", None), getattr(config, "modules_to_save", None))
    return any(_hits(aim, name) for aim in aims for name in names)


def _hits(aim: str | Collection[str] | None, name: str) -> bool:
    """As PEFT matches: a pattern, or ends of dotted names."""
    if isinstance(aim, str):
        return aim != "all-linear" and re.fullmatch(aim, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in aim or ())


def row_obstacle(model: "PreTrainedModel", spec: dict[str, Any]) -> str | None:
    """Why the method of a spec cannot train rows of single tokens beside its adapters; None if it can."""
    config = peft_config(spec)
    if not hasattr(config, "trainable_token_indices"):
        return f"{type(config).__name__} trains no single rows (LoRA does)"
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "PEFT would lose the bias of this output head"
    return None


def stored_tokens(folder: Path) -> list[int]:
    """Ids whose rows learned with the adapter that lies in a folder in PEFT's format."""
    chosen = stored_keys(folder).get("trainable_token_indices")
    lists = chosen.values() if isinstance(chosen, dict) else [chosen or []]
    try:
        return sorted({int(id_) for ids in lists for id_ in ids})
    except (ValueError, TypeError) as error:
        raise InputError(f"trainable_token_indices is no list of token ids: {line(error)}",
                         where=str(folder / "adapter_config.json")) from None


def token_layers(model: "PreTrainedModel") -> list[str]:
    """Names of the embedding and, unless it is the same matrix, the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [_name(model, layer) for layer in layers]


def _name(model: nn.Module, layer: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is layer)
