"""Read the matrices of a LoRA adapter without merging them or leaving PEFT's layers in the model."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lit_llm.errors import InputError
from lit_llm.models.adapters import adapter, starting, virtual_tokens

WHERE = "adapter"
ALONE = "serve this adapter alone, without a name: --adapter FOLDER"


class Matrices(NamedTuple):
    """LoRA's two matrices of a layer: (r, in) and (out, r), the second with the scale."""

    down: Tensor
    up: Tensor


def matrices(model: Any, folder: Path) -> dict[str, Matrices]:
    """The matrices of an adapter by the name of their layer; the model is left as it was.

    Args:
        model: The base model.
        folder: In PEFT's format.

    Raises:
        InputError: The adapter is not plain LoRA on linear layers other than the head, or does not fit the model.
    """
    if (folder / starting.FIRST).is_dir() or (folder / adapter.ROWS).is_file():
        raise InputError(f"{folder} was trained on a base that another adapter or new tokens had changed", where=WHERE,
                         fix=ALONE)
    if virtual_tokens.count_in(folder):
        raise InputError(f"{folder} adds virtual tokens, which no other request may read", where=WHERE, fix=ALONE)
    head, before = model.get_output_embeddings(), {id(weight) for weight in model.parameters() if weight.requires_grad}
    wrapped = starting.load(model, folder)
    layers = adapter.adapted_layers(wrapped)
    # The head sees the last tokens of prompts only.
    unsupported = [name for name, (layer, is_plain) in layers.items() if not is_plain or layer.get_base_layer() is head]
    by_layer = {name: Matrices(layer.lora_A["default"].weight.detach(),
                             layer.lora_B["default"].weight.detach() * layer.scaling["default"])
                for name, (layer, _) in layers.items() if name not in unsupported}
    wrapped.unload()
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in before)
    if unsupported or not by_layer:
        what = (f"changes {unsupported[0]} by more than LoRA on a linear layer" if unsupported else
                "changes no layer of this model")
        raise InputError(f"{folder} {what}", where=WHERE, fix=ALONE)
    return by_layer
