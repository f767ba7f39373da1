"""Several LoRA adapters of one base model, each applied to the tokens of its own requests within one forward pass.

The base's linear layers are computed once for all tokens of a step. To the tokens of each adapter, the product of its
two low-rank matrices is added, as PEFT does for one adapter. Nothing is merged, so the base serves requests as well.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.errors import InputError
from lit_llm.models.adapters import unmerged


class PartialRowError(Exception):
    """A layer sees some of the tokens only, as an expert does, so that their adapters are not known."""


class Adapters:
    """The adapters of a model and the tokens to which each is applied in the present pass.

    Args:
        names: Of the adapters.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.names = frozenset(names)
        self.tokens: dict[str, Tensor | None] = {}  # their places in the row of all tokens; null is the whole row
        self.count = 0                              # tokens of the row

    @contextmanager
    def applied(self, parts: Iterable[tuple[str | None, int]], device: torch.device) -> Iterator[None]:
        """Within, a pass applies to each part of its row the adapter of that part.

        Args:
            parts: Adapter (null is the base) and number of tokens, in the order of the row.
            device: Of the model.
        """
        places: dict[str | None, list[int]] = {}
        self.count = 0
        for name, count in parts if self.names else ():
            places.setdefault(name, []).extend(range(self.count, self.count + count))
            self.count += count
        self.tokens = {name: None if len(places) == 1 else torch.tensor(at, device=device)
                       for name, at in places.items() if name is not None}
        try:
            yield
        finally:
            self.tokens = {}


class _Adapted(nn.Module):
    """A linear layer with the matrices of several adapters.

    Args:
        base: The layer.
        matrices: By the name of the adapter.
        adapters: Says to which tokens they are applied.
    """

    def __init__(self, base: nn.Module, matrices: Mapping[str, unmerged.Matrices], adapters: Adapters) -> None:
        super().__init__()
        self.base, self.matrices, self.adapters = base, dict(matrices), adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:                      # some models read sizes of their layers
            return getattr(super().__getattr__("base"), name)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.base(inputs)
        for name, places in self.adapters.tokens.items():
            if name not in self.matrices:           # this adapter leaves the layer as it is
                continue
            down, up = self.matrices[name]
            if places is not None and inputs.shape[-2] != self.adapters.count:
                raise PartialRowError
            rows = inputs if places is None else inputs[..., places, :]
            more = (rows.to(down.dtype) @ down.T @ up.T).to(out.dtype)
            out = out + more if places is None else out.index_add(-2, places, more)
        return out


def load(model: Any, folders: Mapping[str, str | Path]) -> Adapters:
    """Attach adapters to a model's linear layers.

    Args:
        model: A causal LM, in its final place; its layers are replaced.
        folders: Name -> folder in PEFT's format.

    Raises:
        InputError: An adapter that is not plain LoRA on linear layers, or that does not fit the model.
    """
    adapters = Adapters(folders)
    by_layer: dict[str, dict[str, unmerged.Matrices]] = {}
    for name, folder in folders.items():
        for place, matrices in unmerged.matrices(model, Path(folder)).items():
            by_layer.setdefault(place, {})[name] = matrices
    for place, of_layer in by_layer.items():
        parent, _, last = place.rpartition(".")
        setattr(model.get_submodule(parent), last, _Adapted(model.get_submodule(place), of_layer, adapters))
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    for name, folder in folders.items():
        with adapters.applied([(name, 8), (None, 8)], model.device), torch.no_grad():
            try:
                model(input_ids=ids, use_cache=False)
            except PartialRowError:
                raise InputError(f"{folder} adapts layers that see some of the tokens only", where=unmerged.WHERE,
                                 fix=unmerged.ALONE) from None
    return adapters
