"""One stage of a run's data, planned: which sequences there are, how they lie in rows, and what they were made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llm.data.rows.corpus import Corpus
from lit_llm.data.rows.packing import Rows
from lit_llm.data.tokens.store import TokenStore


@dataclass(frozen=True, slots=True)
class Plan:
    """One stage's data.

    Args:
        corpus: The sequences there are.
        rows: How they lie in rows, in the first epoch.
        notes: How many were cut, dropped, said before.
        fingerprint: What the rows are made of, by names (`identity.py`).
        stores: Of each source, where its tokens lie, and what became of its records.
        draw: The rows of an epoch, where they differ.
    """

    corpus: Corpus
    rows: Rows
    notes: dict[str, int]
    fingerprint: dict[str, Any]
    stores: Sequence[TokenStore] = ()
    draw: Callable[[int], Rows] | None = None
