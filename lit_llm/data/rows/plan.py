"""The plan of one stage of a run's data: its sequences, how they are packed, and their identity."""

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
        corpus: All sequences.
        rows: Packed sequences of the first epoch.
        notes: Numbers of cut, dropped and duplicate sequences.
        fingerprint: Identity of the packed sequences by named parts (`identity.py`).
        stores: Token store and report of each source.
        draw: Function epoch -> packed sequences if epochs differ.
    """

    corpus: Corpus
    rows: Rows
    notes: dict[str, int]
    fingerprint: dict[str, Any]
    stores: Sequence[TokenStore] = ()
    draw: Callable[[int], Rows] | None = None
