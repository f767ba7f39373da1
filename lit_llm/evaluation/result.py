"""What was measured of one model: sums of each document, their figures with intervals, and the difference of two.

The sums of each document are kept in the result, so that a later model can be compared with it document by document.
"""

import math
import platform
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np

from lit_llm import __version__
from lit_llm.errors import InputError
from lit_llm.evaluation.material import Material, Units
from lit_llm.statistics import intervals
from lit_llm.statistics.documents import Documents
from lit_llm.training.step.breakdown import Breakdown

WORST = 10                                          # documents of a comparison that are named
ORDER = ("nll", "perplexity", "bits_per_byte", "bits_per_character", "token_accuracy")
ROUNDING = 1e-5                                     # nats per token that two computations of the same model may differ


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value.

    Args:
        value: The value.
        low: Lower end of its 95 % interval; null where there are fewer than five documents, or all agree.
        high: Upper end.
        reliable: Whether there are enough documents for the interval to cover 95 %.
        count: Number of `unit`s that it is a mean over.
        unit: `tokens`, `bytes`, `characters` or `words`.
    """

    value: float
    low: float | None
    high: float | None
    reliable: bool
    count: int
    unit: str = "tokens"


@dataclass(frozen=True, eq=False)
class Result:
    """Sums of each document, and what was measured.

    Args:
        name: Name of the model, as it was typed.
        measured: Model, data, tokenizer, windows, versions, by name.
        units: The documents or conversations.
        nll: (U,) summed NLL in nats.
        correct: (U,) tokens that were the most likely ones; -1 where a server does not tell.
        material: The texts; null for a stored result.
        is_base: Whether it is the model before training, which another one is compared with.
        notes: Numbers of records that were cut, dropped or set aside.
        cells: (C, 9) the sums of each document by answer and position (`breakdown.COLUMNS`); null where these are not
            told apart.
    """

    name: str
    measured: dict[str, Any]
    units: Units
    nll: np.ndarray
    correct: np.ndarray
    material: Material | None = None
    is_base: bool = False
    notes: dict[str, int] = field(default_factory=dict)
    cells: np.ndarray | None = None

    @cached_property
    def documents(self) -> Documents:
        """The sums of the documents that have a scored token."""
        every = Documents(np.arange(len(self.units)), self.units.source, self.nll, self.units.tokens, self.units.bytes,
                          self.units.characters, self.correct, tuple(self.units.sources))
        return every.where(self.units.tokens > 0)

    def figures(self) -> dict[str, Figure]:
        """The figures of all documents, each with its interval."""
        documents = self.documents
        if self.units.words is None:
            return figures_of(documents)
        words = self.units.words[documents.document]
        by_word, by_byte = (_figure(float(documents.nll.sum() / counts.sum()), intervals.ratio(documents.nll, counts),
                                    int(counts.sum()), unit) for counts, unit in ((words, "words"),
                                                                                  (documents.bytes, "bytes")))
        return {"word_perplexity": _exp(by_word), "byte_perplexity": _exp(by_byte), **figures_of(documents)}

    def by_source(self) -> dict[str, dict[str, Figure]]:
        """The figures of each source, by its name; empty for a single source."""
        parts = self.documents.by_source()
        return {name: figures_of(part) for name, part in parts.items()} if len(parts) > 1 else {}

    @cached_property
    def details(self) -> dict[str, dict[str, Any]]:
        """`answers` and `positions`: the figures of each answer of a conversation, and by the tokens before a token."""
        if self.cells is None:
            return {}
        details = Breakdown(self.documents, self.cells).details()
        return {name: details[name] for name in ("answers", "positions") if len(details.get(name, ())) > 1}


def figures_of(documents: Documents) -> dict[str, Figure]:
    """The figures of some documents, each with its interval and the count that it is a mean over."""
    values = documents.figures()
    counts = {"bits_per_byte": "bytes", "bits_per_character": "characters"}
    return {name: _figure(values[name], documents.interval(name), int(values["tokens"]) if name not in counts else int(
                getattr(documents, counts[name]).sum()), counts.get(name, "tokens"))
            for name in ORDER if name in values and (name != "token_accuracy" or (documents.correct >= 0).all())}


@dataclass(frozen=True, slots=True)
class Difference:
    """A model compared with another one on the same documents.

    Args:
        name: The model.
        before: The model that it is compared with.
        nll: Difference of the NLL per token, the first minus the second: negative is better.
        worse: Documents whose NLL is higher, by more than rounding.
        documents: Compared documents.
        worst: The documents whose NLL rose most, per token: `unit`, `source`, `place`, `excerpt`, `nll`, `before`.
    """

    name: str
    before: str
    nll: Figure
    worse: int
    documents: int
    worst: list[dict[str, Any]]


def difference(result: Result, before: Result) -> Difference:
    """Compare two results document by document.

    Raises:
        InputError: They were measured on different data, or with tokenizers that give different tokens.
    """
    if reason := incomparable(result, before):
        raise InputError(f"{result.name} cannot be compared with {before.name}: {reason}", where="evaluate",
                         fix="evaluate both on the same data and windows: python -m lit_llm evaluate ONE OTHER --data "
                         "FILE")
    chosen = np.flatnonzero(result.units.tokens > 0)
    one, other, tokens = result.nll[chosen], before.nll[chosen], result.units.tokens[chosen]
    risen = (one - other) / tokens
    worst = []
    for place in np.argsort(-risen, kind="stable")[:WORST]:
        if risen[place] > ROUNDING:
            worst.append({"unit": int(chosen[place]), **_described(result, before, int(chosen[place])),
                          "nll": float(one[place] / tokens[place]), "before": float(other[place] / tokens[place])})
    mean = _figure(float((one - other).sum() / tokens.sum()), intervals.paired(one, other, tokens),
                   int(tokens.sum()))
    return Difference(result.name, before.name, mean, int((risen > ROUNDING).sum()), len(chosen), worst)


def incomparable(result: Result, before: Result) -> str:
    """The reason why two results cannot be compared document by document; empty if they can."""
    for name, words in (("data", "the texts or their windows differ"), ("tokens", "their tokenizers or chat templates "
                                                                         "give different tokens")):
        now, then = (compared.measured["fingerprints"].get(name) for compared in (result, before))
        if now != then:
            changes = [f"{key} is {value} and was {before.measured['windows'].get(key)}"
                       for key, value in result.measured["windows"].items()
                       if before.measured["windows"].get(key) != value]
            return f"{words} ({'; '.join(changes) or f'{now}, not {then}'})"
    return ""


def _described(result: Result, before: Result, unit: int) -> dict[str, str]:
    material = result.material or before.material
    source = result.units.sources[int(result.units.source[unit])]
    if material is None:
        return {"source": source, "place": "", "excerpt": ""}
    return {"source": source, "place": material.places(unit), "excerpt": material.excerpt(unit)}


def _figure(value: float, interval: intervals.Interval | None, count: int, unit: str = "tokens") -> Figure:
    if interval is None:
        return Figure(value, None, None, False, count, unit)
    return Figure(value, interval.low, interval.high, interval.is_reliable, count, unit)


def _exp(figure: Figure) -> Figure:
    low, value, high = (number if number is None else math.inf if number >= 700 else math.exp(number)
                        for number in (figure.low, figure.value, figure.high))
    assert value is not None
    return Figure(value, low, high, figure.reliable, figure.count, figure.unit)


def versions() -> dict[str, str]:
    """Versions of the packages that determine the figures."""
    return {"lit_llm": __version__, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")}}
