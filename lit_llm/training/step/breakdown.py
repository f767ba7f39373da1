"""Break the figures of an evaluation down by source, by answer of a conversation and by position in the context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_llm.statistics import documents
from lit_llm.statistics.documents import Documents

COLUMNS = ("document", "source", "answer", "position", "tokens", "bytes", "characters", "nll", "correct")
OF_DOCUMENTS = [COLUMNS.index(name) for name in documents.COLUMNS]
ANSWER, POSITION = COLUMNS.index("answer"), COLUMNS.index("position")
ANSWERS = 8                                         # later answers of a conversation are one group
ROUNDING = 1e-6                                     # by which sums of the same numbers may differ, relatively


@dataclass(frozen=True, slots=True, eq=False)
class Breakdown:
    """The sums of an evaluation by document, source, answer and position.

    Args:
        documents: The documents.
        cells: (C, 9) float64 of all ranks: `COLUMNS`, of which `lit_llm/data/rows/cells.py` describes the first seven.
    """

    documents: Documents
    cells: np.ndarray

    @classmethod
    def of_cells(cls, cells: np.ndarray, sources: Sequence[str], *, nll: float, tokens: int) -> "Breakdown | None":
        """From the cells of all ranks; null if they do not add up to the whole, as when a loss has other terms.

        Args:
            cells: (C, 9).
            sources: Names of the sources.
            nll: Nats of the whole evaluation.
            tokens: Its supervised tokens.
        """
        sums = Documents.of_rows(cells[:, OF_DOCUMENTS], sources)
        same = abs(sums.nll.sum() - nll) <= ROUNDING * abs(nll) or not np.isfinite(nll)
        return cls(sums, cells) if same and int(sums.tokens.sum()) == tokens and tokens else None

    def headline(self) -> dict[str, float]:
        """The figures that are logged, and can be monitored, beside those of `Perplexity`."""
        values = {name: value for name, value in self.documents.figures().items() if name == "bits_per_character"}
        if interval := self.documents.interval("nll"):
            values |= {"nll_low": interval.low, "nll_high": interval.high}
        values["documents"] = float((self.documents.tokens > 0).sum())
        return values | {f"nll/{name}": part.figures()["nll"] for name, part in sorted(self.sources().items())}

    def sources(self) -> dict[str, Documents]:
        """The documents of each source, worst first; empty if there is only one."""
        parts = self.documents.by_source()
        return parts if len(parts) > 1 else {}

    def details(self) -> dict[str, Any]:
        """All figures with their intervals and counts: `total`, `sources` (worst first), `answers` and `positions`."""
        details: dict[str, Any] = {"total": self.documents.report()}
        if sources := self.sources():
            details["sources"] = {name: part.report() for name, part in sources.items()}
        answers = np.minimum(self.cells[:, ANSWER], ANSWERS + 1)
        for name, parts in (("answers", self._grouped(answers, _name_of_answer, least=1)),
                            ("positions", self._grouped(self.cells[:, POSITION], _name_of_position))):
            if values := dict(parts):
                details[name] = values
        return details

    def lines(self, split: str) -> list[str]:
        """A short table: the nll of all documents and its interval, then that of each source, worst first.

        Args:
            split: Prefix of the metrics, `val` or `test`.
        """
        parts = {f"{split}/nll": self.documents}
        parts |= {f"{split}/nll/{name}": part for name, part in self.sources().items()}
        width, rows = max(map(len, parts)), []
        for name, part in parts.items():
            interval, count = part.interval("nll"), int((part.tokens > 0).sum())
            reach = f"{interval.low:.4g} to {interval.high:.4g}" if interval else "no interval"
            few = "" if interval and interval.is_reliable else ", too few for a sure interval"
            size = f"{int(part.tokens.sum()):>11,} tokens, {count:,} documents{few}"
            rows.append(f"{name:<{width}}  {part.figures()['nll']:<8.5g} {reach:<18} {size}")
        return [f"{'':<{width}}  {'nats':<8} 95 % interval", *rows]

    def _grouped(self, group: np.ndarray, name: Any, least: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
        for number in np.unique(group[group >= least]).astype(int).tolist():
            rows = self.cells[group == number][:, OF_DOCUMENTS]
            yield name(number), Documents.of_rows(rows, self.documents.names).report()


def _name_of_answer(number: int) -> str:
    return str(number) if number <= ANSWERS else f"{number} and later"


def _name_of_position(exponent: int) -> str:
    """Positions of a group: the number of tokens before a token that the model sees."""
    first, last = 2**exponent, 2**(exponent + 1) - 1
    return f"{first}-{last}" if last > first else str(first)
