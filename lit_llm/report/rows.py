"""Read the complete rows of a `metrics.csv`; a power failure or a running process may leave half a row."""

import csv
from collections.abc import Iterator
from pathlib import Path

FIRST = ["step", "epoch", "seconds"]
# Columns that depend on the clock and the machine: two runs that are otherwise equal differ in them.
SPEED, MEMORY = "train/tokens_per_second", "train/peak_memory_gib"
MEASURED = ("seconds", SPEED, MEMORY)
LONGEST = 1 << 16                                   # bytes of a line


def columns_of(file: Path) -> list[str]:
    """The columns of a `metrics.csv`; empty if its header is incomplete."""
    try:
        with open(file, "rb") as stream:
            columns = _fields(stream.readline(LONGEST))
    except OSError:
        return []
    return columns if columns[:1] == FIRST[:1] else []


def whole_rows(file: Path) -> Iterator[dict[str, str] | None]:
    """The rows of a `metrics.csv`, one at a time; null for each incomplete line.

    A row is complete if its line ends, each column is a number or empty, and its step is greater than the previous one.
    """
    columns, step = columns_of(file), -1
    if not columns:
        return
    with open(file, "rb") as stream:
        stream.readline(LONGEST)
        while line := stream.readline(LONGEST):
            fields = _fields(line)
            if len(fields) == len(columns) and fields[0].isdecimal() and int(fields[0]) > step and _are_numbers(fields):
                step = int(fields[0])
                yield dict(zip(columns, fields, strict=True))
            else:
                yield None


def rows_of(file: Path) -> list[dict[str, str]]:
    """The complete rows of a `metrics.csv`; empty if there is no file."""
    return [row for row in whole_rows(file) if row is not None]


def _fields(line: bytes) -> list[str]:
    if not line.endswith(b"\n") or b"\0" in line:
        return []
    try:
        return next(csv.reader([line.decode()]), [])
    except (UnicodeDecodeError, csv.Error):
        return []


def _are_numbers(fields: list[str]) -> bool:
    try:
        return all(not field or float(field) is not None for field in fields)
    except ValueError:
        return False


def last_logged(folder: Path, name: str) -> tuple[int, float] | None:
    """The last step at which a metric was logged in a run's `metrics.csv`, and its value; null if there is none."""
    latest = None
    for row in whole_rows(folder / "metrics.csv"):
        if row is not None and row.get(name):
            latest = int(row["step"]), float(row[name])
    return latest
