"""Read one file, of any supported kind, as raw records, each with its place.

A bad line is given as a value and does not end the file; the caller decides what to do with it. Files are read as they
are asked for, so their size does not matter. CSV, text and tables are read here, JSON in `jsonfile.py`; what a record
means is decided in `formats.py`, and which files there are in `sources.py`.
"""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llm.data.jsonfile import scan_json
from lit_llm.data.record import Found, LongText, Place
from lit_llm.data.textfile import CRLF_NOTE, LONGEST, PACKED, blocks, open_bytes
from lit_llm.errors import InputError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".parquet": "table", ".arrow": "table"}
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
LONG = 4 << 20                                          # characters of a document that is handed on in blocks


def kind_of(path: Path) -> str | None:
    """How a file is read, by its name; None where the name does not say."""
    name = Path(path.name.lower())
    packed = name.suffix in PACKED
    kind = KINDS.get(name.with_suffix("").suffix if packed else name.suffix)
    return None if kind == "table" and packed else kind


def scan_file(path: Path, *, document: str = "auto", parse: bool = True) -> Iterator[Found]:
    """Each record of a file, or the reason why it is none, with its place.

    Args:
        path: The file.
        document: As in `Source`.
        parse: False leaves JSON lines as bytes, for another process to parse.

    Raises:
        InputError: The file cannot be opened, what follows cannot be told apart any more, or it changed meanwhile.
    """
    notes: set[str] = set()
    open_bytes(path).close()
    before = path.stat()
    match kind_of(path) or "text":
        case "table":
            found = scan_table(_open_table(path), str(path))
        case "json":
            found = scan_json(path, notes, parse)
        case "csv":
            found = _csv(path, notes)
        case _:
            found = _text(path, document, notes)
    told: set[str] = set()
    for record, place in found:
        new = notes - told
        told |= new
        yield record, replace(place, notes=tuple(sorted(new))) if new else place
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise InputError("the file changed while it was read", where=str(path), fix="Run again when it is complete.")


# ---- CSV and text ----------------------------------------------------------------------------------------------------

def _csv(path: Path, notes: set[str]) -> Iterator[Found]:
    """Rows as strings, verbatim: a data frame would turn 007 into 7 and NA into null."""
    csv.field_size_limit(LONGEST)
    rows = (row for text, _ in blocks(path, notes) for row in io.StringIO(text, newline=""))
    head = next(rows, "")
    delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t", key=head.count)
    reader = csv.reader(itertools.chain([head], rows), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:                      # where the next row begins, nobody can say
            raise InputError(f"not CSV: {error}", where=f"{path}:{line}") from None
        if not row:
            continue
        if names is None:
            names = row
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"the header has '{twice[0][:40]}' twice", where=f"{path}:{line}")
        elif len(row) != len(names):
            yield InputError(f"the row has {len(row)} fields, and the header {len(names)}"), Place(str(path), line)
        else:
            yield dict(zip(names, row, strict=True)), Place(str(path), line)


def _text(path: Path, document: str, notes: set[str]) -> Iterator[Found]:
    """Documents of a text file; what lies between separator lines is kept to the last character."""
    if document == "line":
        yield from ((row, place) for row, place in _rows(path, notes) if row.strip())
    elif document == "paragraph":
        yield from _paragraphs(path, notes)
    else:
        yield from _separated(path, SEPARATOR_LINE if document == "auto" else None, notes)


def _rows(path: Path, notes: set[str]) -> Iterator[tuple[str, Place]]:
    number = 0
    for block, share in blocks(path, notes):
        for row in _unix(block, notes).removesuffix("\n").split("\n"):
            number += 1
            yield row, Place(str(path), number, share=share)


def _unix(block: str, notes: set[str]) -> str:
    if "\r\n" not in block:
        return block
    notes.add(CRLF_NOTE)
    return block.replace("\r\n", "\n")


def _paragraphs(path: Path, notes: set[str]) -> Iterator[Found]:
    held: list[str] = []
    place = Place(str(path), 1)
    for row, here in _rows(path, notes):
        if row.strip():
            place = place if held else here
            held.append(row)
        elif held:
            yield "\n".join(held), place
            held = []
    if held:
        yield "\n".join(held), place


def _separated(path: Path, separator: re.Pattern[str] | None, notes: set[str]) -> Iterator[Found]:
    """What stands between separators; its place is its first line that is not blank."""
    stretches = _stretches(path, separator, notes)
    held: list[str] = []
    size, place = 0, None
    for text, ends, line, share in stretches:
        if place is None and (text.strip() or (ends and not separator)):
            blank = len(text) - len(text.lstrip())
            place = Place(str(path), line + text.count("\n", 0, blank), share=share)
        held.append(text)
        size += len(text)
        if place and size > LONG and not ends:
            yield LongText(_until_end(held, stretches)), place
        elif place and ends:
            yield "".join(held), place
        elif not ends:
            continue
        held, size, place = [], 0, None


def _until_end(held: list[str], stretches: Iterator[tuple[str, bool, int, float]]) -> Iterator[str]:
    yield from held
    for text, ends, *_ in stretches:
        yield text
        if ends:
            return


def _stretches(path: Path, separator: re.Pattern[str] | None,
               notes: set[str]) -> Iterator[tuple[str, bool, int, float]]:
    """(text, whether its document ends with it, its first line, share of the file read)."""
    line = 1
    for block, share in blocks(path, notes):
        text = _unix(block, notes)
        parts = separator.split(text) if separator else [text]
        for number, part in enumerate(parts, 1):
            yield part, number < len(parts), line, share
            line += part.count("\n")
    yield "", True, line, 1.0


# ---- tables ----------------------------------------------------------------------------------------------------------

def _open_table(path: Path) -> Any:
    import datasets

    kind = path.suffix.lower().removeprefix(".")
    try:
        return datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True)
    except Exception as error:
        raise InputError(f"cannot be read as {kind}: {str(error).splitlines()[0][:200]}", where=str(path)) from None


def scan_table(rows: Any, name: str) -> Iterator[Found]:
    """Rows of a `datasets` table, as plain dicts."""
    number, stream = 0, iter(rows)
    while True:
        number += 1
        try:
            row = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise InputError(f"the table is damaged: {(str(error) or type(error).__name__).splitlines()[0][:200]}",
                             where=f"{name}:record {number}") from None
        yield {key: _without_nulls(value) for key, value in row.items()}, Place(name, number, "record")


def _without_nulls(value: Any) -> Any:
    """Nested objects without the keys that Arrow filled up: it gives all rows the keys of each of them."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
