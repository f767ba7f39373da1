"""Several LoRA adapters of one base model, each applied to the tokens of its own requests within one forward pass.

The base's layers are computed once for all tokens of a step. To the tokens of each adapter, the product of its two
low-rank matrices is added, as PEFT does for one adapter; rows of the embedding and the output head that it trained
replace those of the base for these tokens only. Nothing is merged, so the base serves requests as well.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_llm.errors import InputError
from lit_llm.models import vocabulary
from lit_llm.models.adapters import adapter, unmerged


class PartialRowError(Exception):
    """A layer sees some of the tokens only, as an expert does, so that their adapters are not known."""


class Span(NamedTuple):
    """Successive tokens of one request in a pass.

    Args:
        adapter: Null is the base.
        tokens: How many there are.
        outputs: How many of them, the last ones, the output head sees.
    """

    adapter: str | None
    tokens: int
    outputs: int


Places = dict[str | None, Tensor | None]            # by adapter: its places in a row; null is the whole row


class Adapters:
    """The adapters of a model and the tokens to which each is applied in the present pass.

    Args:
        vocabularies: The number of token ids of each adapter, and of the base under null.
    """

    def __init__(self, vocabularies: Mapping[str | None, int] | None = None) -> None:
        self.vocabularies = dict(vocabularies or {})
        self.names = frozenset(name for name in self.vocabularies if name is not None)
        self._tokens: tuple[int, Places] = (0, {})  # length of the row, and places in it
        self._outputs: tuple[int, Places] = (0, {})     # the same of what the output head sees

    @contextmanager
    def applied(self, spans: Iterable[Span], device: torch.device) -> Iterator[None]:
        """Within, a pass applies to each span of its row the adapter of that span.

        Args:
            spans: In the order of the row.
            device: Of the model.
        """
        if self.names:
            spans = list(spans)
            self._tokens = _places([(span.adapter, span.tokens) for span in spans], device)
            self._outputs = _places([(span.adapter, span.outputs) for span in spans], device)
        try:
            yield
        finally:
            self._tokens = self._outputs = (0, {})

    def places(self, length: int, *, head: bool = False) -> Places:
        """The places of each adapter's tokens in the row that a layer sees.

        Args:
            length: Of the row.
            head: Whether the layer is the output head, which may see some of the tokens.

        Raises:
            PartialRowError: The layer sees another row than that of all tokens.
        """
        for count, places in (self._tokens, *([self._outputs] if head else [])):
            if count == length or len(places) < 2:
                return places
        raise PartialRowError


def _places(spans: list[tuple[str | None, int]], device: torch.device) -> tuple[int, Places]:
    """The length of a row, and the places of each adapter in it."""
    places: dict[str | None, list[int]] = {}
    length = 0
    for name, count in spans:
        places.setdefault(name, []).extend(range(length, length + count))
        length += count
    return length, {name: None if len(places) == 1 else torch.tensor(at, device=device) for name, at in places.items()}


class _Adapted(nn.Module):
    """A layer with the changes of several adapters.

    Args:
        base: An embedding or a linear layer.
        changes: By the name of the adapter.
        adapters: Says to which tokens they are applied.
    """

    def __init__(self, base: nn.Module, changes: Mapping[str, unmerged.Change], adapters: Adapters) -> None:
        super().__init__()
        self.base, self.changes, self.adapters = base, dict(changes), adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:                      # some models read sizes of their layers
            return getattr(super().__getattr__("base"), name)


class _Linear(_Adapted):
    """A linear layer."""

    is_head = False

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.base(inputs)
        for name, places in self.adapters.places(inputs.shape[-2], head=self.is_head).items():
            if name not in self.changes:            # this adapter leaves the layer as it is
                continue
            matrices, rows = self.changes[name]
            own = inputs if places is None else inputs[..., places, :]
            if rows is not None:
                bias: Tensor | None = getattr(self.base, "bias", None)
                logits = nn.functional.linear(own.to(rows.values.dtype), rows.values,
                                              bias if bias is None else bias[rows.ids]).to(out.dtype)
                out = _replaced(out, places, rows.ids, logits)
            if matrices is not None:
                more = (own.to(matrices.down.dtype) @ matrices.down.T @ matrices.up.T).to(out.dtype)
                out = out + more if places is None else out.index_add(-2, places, more)
        return out


def _replaced(logits: Tensor, places: Tensor | None, ids: Tensor, values: Tensor) -> Tensor:
    """(..., T, V) logits with (..., P, K) others at some places and ids."""
    if places is None:
        return logits.index_copy(-1, ids, values)
    return logits.index_copy(-2, places, logits[..., places, :].index_copy(-1, ids, values))


class _Head(_Linear):
    """The output head. Tokens that an adapter's vocabulary lacks have the logit -inf with it."""

    is_head = True

    def forward(self, inputs: Tensor) -> Tensor:
        out = super().forward(inputs)
        for name, places in self.adapters.places(inputs.shape[-2], head=True).items():
            if self.adapters.vocabularies[name] < out.shape[-1]:
                at = places if places is not None else torch.arange(out.shape[-2], device=out.device)
                allowed = torch.arange(out.shape[-1], device=out.device) < self.adapters.vocabularies[name]
                out = out.index_copy(-2, at, out[..., at, :].masked_fill(~allowed, -torch.inf))
        return out


class _Embedding(_Adapted):
    """An embedding with rows of some tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.base(ids)
        for name, places in self.adapters.places(ids.shape[-1]).items():
            rows = self.changes[name].rows if name in self.changes else None
            if rows is None:
                continue
            own = ids if places is None else ids[..., places]
            same = own[..., None] == rows.ids       # (..., P, K)
            scale = getattr(self.base, "embed_scale", None)
            values = rows.values if scale is None else rows.values * torch.as_tensor(scale).to(rows.values.dtype)
            old = out if places is None else out[..., places, :]
            new = torch.where(same.any(-1, keepdim=True), values[same.int().argmax(-1)].to(out.dtype), old)
            out = new if places is None else out.index_copy(-2, places, new)
        return out


def load(model: Any, folders: Mapping[str, str | Path]) -> Adapters:
    """Attach adapters to a model's layers. The model gets new rows if adapters have a larger vocabulary.

    Args:
        model: A causal LM, in its final place; its layers are replaced.
        folders: Name -> folder in PEFT's format.

    Raises:
        InputError: An adapter that is not plain LoRA on linear layers with rows of single tokens, or that does not fit
            the model.
    """
    vocabularies: dict[str | None, int] = {None: vocabulary.rows(model)}
    by_layer: dict[str, dict[str, unmerged.Change]] = {}
    for name, folder in folders.items():
        for place, change in unmerged.changes(model, Path(folder)).items():
            by_layer.setdefault(place, {})[name] = change
        vocabularies[name] = adapter.stored_rows(Path(folder)) or vocabularies[None]
    adapters, head = Adapters(vocabularies), model.get_output_embeddings()
    if len(set(vocabularies.values())) > 1:
        by_layer.setdefault(next(place for place, layer in model.named_modules() if layer is head), {})
    for place, of_layer in by_layer.items():
        layer, (parent, _, last) = model.get_submodule(place), place.rpartition(".")
        kind = _Head if layer is head else _Embedding if isinstance(layer, nn.Embedding) else _Linear
        setattr(model.get_submodule(parent), last, kind(layer, of_layer, adapters))
    ids = torch.arange(16, device=model.device)[None] % model.config.get_text_config().vocab_size
    for name, folder in folders.items():
        with adapters.applied([Span(name, 8, 8), Span(None, 8, 8)], model.device), torch.no_grad():
            try:
                model(input_ids=ids, use_cache=False)
            except PartialRowError:
                raise InputError(f"{folder} adapts layers that see some of the tokens only", where=unmerged.WHERE,
                                 fix=unmerged.ALONE) from None
    return adapters

