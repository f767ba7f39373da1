"""A raw record as it was read from a file or a table, and the place that it came from.

What a record means is decided in `formats.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_llm.errors import InputError


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record came from.

    Args:
        path: The file, or the hub dataset.
        number: A line (JSON, CSV, text) or a record number (tables, the hub), from 1.
        unit: Which of them, `line` or `record`.
        share: Of its file, read so far; for the time left.
        column: Where it begins in its line, if it is not the first one there; else 0.
        notes: What was mended in the file, with the first record that comes after.
    """

    path: str
    number: int
    unit: str = "line"
    share: float = field(default=0.0, compare=False)
    column: int = field(default=0, compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        if self.unit != "line":
            return f"{self.path}:record {self.number}"
        return f"{self.path}:{self.number}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True, slots=True)
class LongText:
    """One document, in blocks that end with a line, to be read to their end before the next record is asked for."""

    blocks: Iterator[str]


Record = dict[str, Any] | str | bytes | LongText        # bytes: a JSON line for `parse_line`
Found = tuple[Record | InputError, Place]
