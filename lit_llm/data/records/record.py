"""A raw record as it was read from a file or a table, and the place that it came from.

What a record means is decided in `formats.py`.
"""

import json
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
    """One document, in blocks that end with a line as a rule; all are read before the next record is asked for."""

    blocks: Iterator[str]


Record = dict[str, Any] | str | bytes | LongText        # bytes: a JSON line for `parse_line`
Found = tuple[Record | InputError, Place]


def shown(value: Any) -> str:
    """The beginning of a value as JSON, without writing all of it.

    >>> shown({"a": [1, 2]})
    '{"a": [1, 2]}'
    """
    parts: list[str] = []
    encoder = json.JSONEncoder(ensure_ascii=False, default=str)
    for part in encoder.iterencode(value[:40] if isinstance(value, str | list | tuple) else value):
        parts.append(part[:40])
        if sum(map(len, parts)) >= 40:
            break
    return "".join(parts)[:40]


def size_of_value(value: Any) -> int:
    """About how many characters the texts of a record have; what is empty takes memory, too, and counts as some."""
    if isinstance(value, str | bytes):
        return len(value) or 8
    if isinstance(value, dict):
        return sum(map(size_of_value, value.values())) or 8
    return (sum(map(size_of_value, value)) or 8) if isinstance(value, list) else 8
