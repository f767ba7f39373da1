"""A raw record as read from a file or table, and its place.

`formats.py` interprets records.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lit_llm.errors import InputError


@dataclass(frozen=True, slots=True)
class Place:
    """Origin of a record.

    Args:
        path: File or hub dataset.
        number: Line number (JSON, CSV, text) or record number (tables, hub), from 1.
        unit: Kind of number, `line` or `record`.
        share: Share of the file read so far, for the remaining time.
        column: Start column if it is not the first record of its line; otherwise 0.
        notes: Corrections of the file, given with the first record after each.
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
    """One document in blocks, usually of whole lines; they must be read before the next record."""

    blocks: Iterator[str]


Record = dict[str, Any] | str | bytes | LongText        # bytes: a JSON line for `parse_line`
Found = tuple[Record | InputError, Place]


def shown(value: object) -> str:
    """The beginning of a value as JSON, without encoding all of it.

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


def size_of_value(value: object) -> int:
    """Approximate characters of a record's texts; empty values also count, because they take memory."""
    if isinstance(value, str | bytes):
        return len(value) or 8
    if isinstance(value, dict):
        return sum(map(size_of_value, value.values())) or 8
    return (sum(map(size_of_value, value)) or 8) if isinstance(value, list) else 8
