"""Pieces of a report's HTML: tables, and values as text; everything from data is escaped."""

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

ROWS = 60                                           # rows of a table; report.json has all


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells in HTML; columns of numbers are set flush right, and rows beyond `ROWS` are counted."""
    every = [list(row) for row in rows]
    shown_rows = every[:ROWS]
    numeric = [all(_is_number(row[column]) for row in shown_rows) for column in range(len(head))]
    classes = [" class=number" if is_number and shown_rows else "" for is_number in numeric]
    top = "".join(f"<th{name}>{cell}</th>" for cell, name in zip(head, classes, strict=True)) if any(head) else ""
    lines = ["<tr>" + "".join(f"<td{name}>{cell}</td>" for cell, name in zip(row, classes, strict=True)) + "</tr>"
             for row in shown_rows]
    more = f"<p class=soft>+ {len(every) - ROWS:,} (report.json)</p>" if len(every) > ROWS else ""
    return f"<div class=wide><table>{f'<tr>{top}</tr>' if top else ''}{''.join(lines)}</table></div>{more}"


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] == "-"


def safe(value: Any) -> str:
    """A text of the data as HTML, without control characters except line ends."""
    return html.escape("".join(char for char in str(value) if char.isprintable() or char == "\n"))


def place(path: Any) -> str:
    """The last part of a path, with the whole path as its tooltip."""
    return f'<span title="{safe(path)}">{safe(str(path).rstrip("/").rpartition("/")[2])}</span>'


def value(item: Any) -> str:
    """A setting as HTML."""
    return safe(json.dumps(item, ensure_ascii=False) if isinstance(item, dict | list | bool | None) else item)


def shown(item: Any) -> str:
    """A number with six digits, or a text; empty for null."""
    if item is None:
        return ""
    if isinstance(item, bool) or not isinstance(item, int | float):
        return safe(item)
    return f"{item:,}" if isinstance(item, int) else f"{item:,.0f}" if abs(item) >= 1e5 else f"{item:.6g}"


def amount(count: Any) -> str:
    """A large number with a unit: 1.23 M; empty for null.

    >>> [amount(count) for count in (None, 950.0, 1234567, 2.5e15)]
    ['', '950', '1.23 M', '2.5e+15']
    """
    if not isinstance(count, int | float):
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(count) < 1000 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def percent(part: Any, whole: Any) -> str:
    """A share in percent; empty if it is not known."""
    return f"{part / whole:.1%}" if isinstance(part, int | float) and isinstance(whole, int | float) and whole else ""


def duration(seconds: Any) -> str:
    """Seconds as 1 h 02 min; empty for null.

    >>> [duration(seconds) for seconds in (None, 3.21, 75, 7320)]
    ['', '3.2 s', '1 min 15 s', '2 h 02 min']
    """
    if not isinstance(seconds, int | float):
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"

