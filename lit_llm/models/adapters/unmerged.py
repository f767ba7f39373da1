"""Read what a LoRA adapter changes without merging it or leaving PEFT's layers in the model."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.errors import InputError
from lit_llm.models.adapters import adapter, starting, virtual_tokens

WHERE = "adapter"
ALONE = "serve this adapter alone, without a name: --adapter FOLDER"
INNER = (".token_adapter", ".base_layer")           # parts of names that PEFT's wrappers add


class Matrices(NamedTuple):
    """LoRA's two matrices of a layer: (r, in) and (out, r), the second with the scale."""

    down: Tensor
    up: Tensor


class Rows(NamedTuple):
    """Rows of an embedding or an output head that replace its own: their (K,) token ids and (K, D) values."""

    ids: Tensor
    values: Tensor


class Change(NamedTuple):
    """What an adapter changes in a layer: one or both."""

    matrices: Matrices | None = None
    rows: Rows | None = None


def changes(model: Any, folder: Path) -> dict[str, Change]:
    """The changes of an adapter by the name of their layer.

    Args:
        model: The base model. It gets new rows at the end if the adapter was trained with a larger vocabulary, and is
            left as it was otherwise.
        folder: In PEFT's format.

    Raises:
        InputError: The adapter changes more than linear layers by LoRA and rows of single tokens, or does not fit the
            model.
    """
    if (folder / starting.FIRST).is_dir():
        raise InputError(f"{folder} was trained on a base that another adapter had changed", where=WHERE, fix=ALONE)
    if virtual_tokens.count_in(folder):
        raise InputError(f"{folder} adds virtual tokens, which no other request may read", where=WHERE, fix=ALONE)
    before = {id(weight) for weight in model.parameters() if weight.requires_grad}
    wrapped = starting.load(model, folder)
    by_layer: dict[str, Change] = {}
    unsupported: list[str] = []
    for name, (layer, is_plain) in adapter.adapted_layers(wrapped).items():
        if hasattr(layer, "token_adapter"):         # a wrapper: the layer inside it has the rows
            continue
        place = _place(name)
        change = _matrices(layer) if is_plain else _rows(layer)
        if change is None or place in by_layer:
            unsupported.append(place)
        else:
            by_layer[place] = change
    wrapped.unload()
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in before)
    if unsupported or not by_layer:
        what = (f"changes {unsupported[0]} by more than LoRA on a linear layer or rows of single tokens" if unsupported
                else "changes no layer of this model")
        raise InputError(f"{folder} {what}", where=WHERE, fix=ALONE)
    return by_layer


def _place(name: str) -> str:
    """The name of a layer in the base."""
    for end in INNER:
        name = name.removesuffix(end)
    return name


def _matrices(layer: Any) -> Change:
    return Change(Matrices(layer.lora_A["default"].weight.detach(),
                           layer.lora_B["default"].weight.detach() * layer.scaling["default"]))


def _rows(layer: Any) -> Change | None:
    """The trained rows of a layer; null if it is adapted otherwise."""
    values = getattr(layer, "trainable_tokens_delta", {}).get("default")
    if values is None or not isinstance(layer.base_layer, nn.Embedding | nn.Linear):
        return None
    if getattr(layer.base_layer, "max_norm", None) is not None:
        return None
    weight = layer.base_layer.weight
    return Change(rows=Rows(torch.tensor(layer.token_indices["default"], device=weight.device),
                            values.detach().to(weight.device, weight.dtype)))
