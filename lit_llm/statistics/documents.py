"""Sums of each evaluated document or conversation, from which all figures and their intervals are computed."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.errors import InputError
from lit_llm.statistics import intervals
from lit_llm.statistics.intervals import Interval

RATIOS = {"nll": ("nll", "tokens", 1.0), "bits_per_byte": ("nll", "bytes", math.log(2)),
          "bits_per_character": ("nll", "characters", math.log(2)), "token_accuracy": ("correct", "tokens", 1.0)}
LARGEST = 700.0                                     # nats whose exponential is still finite


@dataclass(frozen=True, eq=False)
class Documents:
    """Columns of N documents, one row each.

    Args:
        document: (N,) int64, the document's number in its data, by which two models' records are matched.
        source: (N,) int64, index into `names`.
        nll: (N,) float64, summed over the supervised tokens, in nats.
        tokens: (N,) int64, supervised tokens.
        bytes: (N,) int64, UTF-8 bytes of these tokens; 0 where they are not known.
        characters: (N,) int64, characters of these tokens; 0 where they are not known.
        correct: (N,) int64, supervised tokens that were the most likely prediction.
        names: Names of the sources.
    """

    document: np.ndarray
    source: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    characters: np.ndarray
    correct: np.ndarray
    names: tuple[str, ...] = ("",)

    @classmethod
    def of_rows(cls, rows: Iterable[Sequence[float]] | np.ndarray, names: Sequence[str] = ("",)) -> "Documents":
        """From rows in any order; those of one document of a source are added, and documents sorted by their source.

        Args:
            rows: (R, 7) numbers in the order of the columns.
            names: Names of the sources.
        """
        table = np.asarray(rows if isinstance(rows, np.ndarray) else list(rows), dtype=np.float64).reshape(-1, 7)
        table = table[np.lexsort(table.T[::-1])]        # sums do not depend on the order in which parts were computed
        keys, index = np.unique(table[:, 1::-1].astype(np.int64), axis=0, return_inverse=True)
        sums = [np.bincount(index.reshape(-1), column, len(keys)) for column in table[:, 2:].T]
        tokens, size, characters, correct = (count.astype(np.int64) for count in sums[1:])
        return cls(keys[:, 1], keys[:, 0], sums[0], tokens, size, characters, correct, tuple(names))

    def __len__(self) -> int:
        return len(self.document)

    def where(self, which: np.ndarray) -> "Documents":
        """The documents of a mask or of indices."""
        return replace(self, **{name: getattr(self, name)[which] for name in COLUMNS})

    def by_source(self) -> dict[str, "Documents"]:
        """The documents of each source that has any, those of the highest nll first."""
        return self._by_source

    @cached_property
    def _by_source(self) -> dict[str, "Documents"]:
        parts = {name: self.where(self.source == number) for number, name in enumerate(self.names)}
        present = {name: part for name, part in parts.items() if part.tokens.sum()}
        return dict(sorted(present.items(), key=lambda item: -item[1].figures()["nll"]))

    def figures(self) -> dict[str, float]:
        """All values without intervals: `nll`, `perplexity`, `bits_per_byte` ... and the counts; see `figures`."""
        return figures(float(self.nll.sum()), **{name: int(getattr(self, name).sum()) for name in COUNTS})

    def interval(self, name: str) -> Interval | None:
        """The 95 % interval of a figure over documents; null without enough documents, or without its counts.

        Each is computed once: a validation logs, prints and stores the same ones.

        Args:
            name: A key of `RATIOS`, or perplexity, whose interval is that of the nll on its scale.
        """
        if name not in self._intervals:
            self._intervals[name] = self._interval(name)
        return self._intervals[name]

    @cached_property
    def _intervals(self) -> dict[str, Interval | None]:
        return {}

    def _interval(self, name: str) -> Interval | None:
        if name == "perplexity":
            ends = self.interval("nll")
            return ends and replace(ends, low=_exp(ends.low), high=_exp(ends.high))
        above, below, unit = RATIOS[name]
        ends = intervals.ratio(getattr(self, above), getattr(self, below) * unit)
        if ends is not None and name == "token_accuracy":
            ends = replace(ends, high=min(1.0, ends.high))
        return ends

    def report(self) -> dict[str, Any]:
        """All figures, each interval as `NAME_low` and `NAME_high`, the number of documents, and `few_documents`.

        `few_documents` is there, and true, where the intervals cover the truth less often than they state.
        """
        values: dict[str, Any] = dict(self.figures())
        of_nll = None
        for name in [name for name in (*RATIOS, "perplexity") if name in values]:
            if interval := self.interval(name):
                of_nll = interval
                values |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
        values["documents"] = int((self.tokens > 0).sum())
        return values | ({"few_documents": True} if of_nll is None or not of_nll.is_reliable else {})

    # ---- files -------------------------------------------------------------------------------------------------------

    def lines(self, more: Mapping[str, Sequence[Any]] | None = None) -> Iterator[str]:
        """Each document as a line of JSON, with the name of its source.

        Args:
            more: Further columns of N values.
        """
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        columns |= {name: list(values) for name, values in (more or {}).items()}
        columns["source"] = [self.names[number] for number in columns["source"]]
        for values in zip(*columns.values(), strict=True):
            yield json.dumps(dict(zip(columns, values, strict=True)), ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, file: Path) -> "Documents":
        """Read a file of `lines`.

        Raises:
            InputError: A line is not such a record.
        """
        names: dict[str, int] = {}
        rows = []
        try:
            with open(file, encoding="utf-8") as stream:
                for line in stream:
                    values = json.loads(line)
                    values["source"] = names.setdefault(str(values["source"]), len(names))
                    rows.append([float(values[name]) for name in COLUMNS])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"it is not a file of documents' sums: {error}", where=f"{file}:{len(rows) + 1}") from None
        return cls.of_rows(rows, tuple(names) or ("",))


COLUMNS = tuple(field.name for field in fields(Documents) if field.name != "names")
COUNTS = ("tokens", "bytes", "characters", "correct")


def figures(nll: float, *, tokens: int, bytes: int, characters: int, correct: int) -> dict[str, float]:
    """The figures of summed values; without tokens they are nan, and without bytes or characters theirs are left out.

    Args:
        nll: Nats.
        tokens: Supervised tokens.
        bytes: UTF-8 bytes of these.
        characters: Characters of these.
        correct: Tokens that were the most likely prediction.
    """
    sums = {"nll": nll, "tokens": tokens, "bytes": bytes, "characters": characters, "correct": correct}
    values = {name: sums[above] / unit / sums[below] if sums[below] else math.nan
              for name, (above, below, unit) in RATIOS.items() if sums[below] or not tokens}
    return values | {"perplexity": _exp(values["nll"]), "tokens": float(tokens)}


def _exp(nats: float) -> float:
    return math.inf if nats >= LARGEST else math.exp(nats)
