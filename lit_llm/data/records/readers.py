"""Read one file of any supported type as raw records, each with its place.

A bad line is yielded as an error and does not end the file; the caller decides what to do with it. Files are read
lazily, so their size does not matter. CSV, text and tables are read here, JSON in `jsonfile.py`; `formats.py`
interprets records, and `sources.py` finds the files.
"""

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llm.data.records.jsonfile import scan_json
from lit_llm.data.records.record import Found, LongText, Place, size_of_value
from lit_llm.data.records.textfile import CRLF_NOTE, DIVIDE, LONGEST, PACKED, blocks, open_bytes, refuse_blank
from lit_llm.errors import InputError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".parquet": "table", ".arrow": "table"}
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
PACKED_AT_MOST = 50                                     # limit on the compression ratio of a table; text has 2 to 10
LONG = 1 << 20                                          # characters above which a document is passed on in blocks


def kind_of(path: Path) -> str | None:
    """The type of a file by its name; None if unknown."""
    name = Path(path.name.lower())
    packed = name.suffix in PACKED
    kind = KINDS.get(name.with_suffix("").suffix if packed else name.suffix)
    return None if kind == "table" and packed else kind


def scan_file(path: Path, *, document: str = "auto", parse: bool = True) -> Iterator[Found]:
    """Yield each record of a file, or its error, with its place.

    Args:
        path: The file.
        document: As in `Source`.
        parse: False yields JSON lines as bytes, for parsing in another process.

    Raises:
        InputError: The file cannot be opened, its structure is broken, or it changed while it was read.
    """
    notes: set[str] = set()
    open_bytes(path).close()
    before = path.stat()
    match kind_of(path) or "text":
        case "table":
            records = scan_table(_open_table(path), str(path))
        case "json":
            records = scan_json(path, notes, parse)
        case "csv":
            records = _csv(path, notes)
        case _:
            records = _text(path, document, notes)
    reported: set[str] = set()
    for record, place in records:
        new = notes - reported
        reported |= new
        yield record, replace(place, notes=tuple(sorted(new))) if new else place
    after = path.stat()
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise InputError("the file changed while it was read", where=str(path),
                         fix="Run again when the file is complete.")


# ---- CSV and text ----------------------------------------------------------------------------------------------------

def _csv(path: Path, notes: set[str]) -> Iterator[Found]:
    """CSV rows as verbatim strings: a data frame would convert 007 to 7 and NA to null."""
    csv.field_size_limit(LONGEST)
    size = 0                                            # characters of the current row

    def measured() -> Iterator[str]:
        nonlocal size
        for text, _ in blocks(path, notes):
            for line in io.StringIO(text, newline=""):
                size += len(line)
                if size > LONGEST:
                    raise InputError(f"a row is larger than {LONGEST >> 20} MB", where=f"{path}:{row_begins}",
                                     fix="Is a quote not closed? Otherwise split the record.")
                yield line

    rows, row_begins = measured(), 1
    head = next(rows, "")
    delimiter = "\t" if ".tsv" in path.name.lower() else max(",;\t", key=head.count)
    reader = csv.reader(itertools.chain([head], rows), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    blank = 0
    while True:
        row_begins = line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:                      # the start of the next row is unknown
            raise InputError(f"not CSV: {error}", where=f"{path}:{line}") from None
        size, blank = 0, 0 if row else blank + 1
        if not row:
            refuse_blank(blank, path, line)
            continue
        if names is None:
            names = row
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise InputError(f"the header contains '{twice[0][:40]}' twice", where=f"{path}:{line}")
        elif len(row) != len(names):
            yield InputError(f"the row has {len(row)} fields, but the header has {len(names)}"), Place(str(path), line)
        else:
            yield dict(zip(names, row, strict=True)), Place(str(path), line)


def _text(path: Path, document: str, notes: set[str]) -> Iterator[Found]:
    """Documents of a text file; text between separator lines is unchanged."""
    if document == "line":
        yield from ((row, place) for row, place in _rows(path, notes) if row)
    elif document == "paragraph":
        yield from _paragraphs(path, notes)
    else:
        yield from _separated(path, SEPARATOR_LINE if document == "auto" else None, notes)


def _rows(path: Path, notes: set[str]) -> Iterator[tuple[str | InputError, Place]]:
    """Lines of a file; a blank line is empty, and one longer than `LONGEST` is an error."""
    number = blank = lost = 0
    pending, share = "", 0.0
    for block, share in blocks(path, notes, ends="torn"):
        if block.isspace() and block.endswith("\n") and not (pending or lost):      # possibly one of very many
            blank, number = blank + block.count("\n"), number + block.count("\n")
            refuse_blank(blank, path, number)
            yield "", Place(str(path), number, share=share)
            continue
        rows = _unix(block, notes).split("\n")
        rows[0], pending = pending + rows[0], ""
        if lost and len(rows) > 1:
            number += 1
            yield _too_long("line", lost + len(rows.pop(0))), Place(str(path), number, share=share)
            lost = 0
        pending = rows.pop()
        if lost or len(pending) > LONGEST:
            lost, pending = lost + len(pending), ""
        for row in rows:
            number += 1
            if row and not row.isspace():
                blank = 0
                yield row, Place(str(path), number, share=share)
            else:
                blank += 1
                refuse_blank(blank, path, number)
                yield "", Place(str(path), number, share=share)
    if pending or lost:
        where = Place(str(path), number + 1, share=share)
        yield _too_long("line", lost + len(pending)) if lost else "" if pending.isspace() else pending, where


def _too_long(what: str, size: int) -> InputError:
    return InputError(f"a {what} has {size:,} characters, more than {LONGEST:,}", fix="Add line breaks to the text.")


def _unix(block: str, notes: set[str]) -> str:
    if "\r\n" not in block:
        return block
    notes.add(CRLF_NOTE)
    return block.replace("\r\n", "\n")


def _paragraphs(path: Path, notes: set[str]) -> Iterator[Found]:
    paragraph: list[str] = []
    size, place, wrong = 0, Place(str(path), 1), None
    for row, here in itertools.chain(_rows(path, notes), [("", place)]):
        if row:
            place = here if not (paragraph or wrong) else place
            size += 0 if isinstance(row, InputError) else len(row) + 1
            if isinstance(row, InputError):
                wrong = row
            elif size > LONGEST:
                wrong = _too_long("paragraph", size)
            if wrong:
                paragraph = []
            else:
                paragraph.append(row)                        # type: ignore[arg-type]
        elif paragraph or wrong:
            yield wrong or "\n".join(paragraph), place
            paragraph, size, wrong = [], 0, None


def _separated(path: Path, separator: re.Pattern[str] | None, notes: set[str]) -> Iterator[Found]:
    """Texts between separators; their place is the first line that is not blank."""
    stretches = _stretches(path, separator, notes)
    texts: list[str] = []
    size, place = 0, None
    for text, ends, line, share in stretches:
        if place is None and (text.strip() or (ends and not separator)):
            blank = len(text) - len(text.lstrip())
            place = Place(str(path), line + text.count("\n", 0, blank), share=share)
        texts.append(text)
        size += len(text)
        if not place and size > LONGEST:
            raise InputError(f"the file contains more than {LONGEST >> 20} MB of white space", where=f"{path}:{line}",
                             fix="Is this the right file? If so, remove it.")
        if place and size > LONG and not ends:
            yield LongText(_until_end(texts, stretches)), place
        elif place and ends:
            yield "".join(texts), place
        elif not ends:
            continue
        texts, size, place = [], 0, None


def _until_end(texts: list[str], stretches: Iterator[tuple[str, bool, int, float]]) -> Iterator[str]:
    yield from texts
    for text, ends, *_ in stretches:
        yield text
        if ends:
            return


def _stretches(path: Path, separator: re.Pattern[str] | None,
               notes: set[str]) -> Iterator[tuple[str, bool, int, float]]:
    """(text, whether it ends its document, its first line, share of the file that was read)."""
    line = 1
    for block, share in blocks(path, notes, ends="torn"):
        text = _unix(block, notes)
        parts = separator.split(text) if separator else [text]
        for number, part in enumerate(parts, 1):
            yield part, number < len(parts), line, share
            line += part.count("\n")
    yield "", True, line, 1.0


# ---- tables ----------------------------------------------------------------------------------------------------------

def _open_table(path: Path) -> Any:
    import datasets
    import pyarrow.parquet

    kind = path.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":                       # `datasets` decodes whole row groups, with all repeated cells
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=_rows_at_once(path))
            return (row for batch in batches for row in batch.to_pylist())
        return datasets.load_dataset(kind, data_files=[str(path)], split="train", streaming=True)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot be read as {kind}: {str(error).splitlines()[0][:200]}", where=str(path)) from None


def _rows_at_once(path: Path) -> int:
    """Rows of a parquet file that are decoded together: few if they may be large.

    Raises:
        InputError: It would decode to much more data than its size suggests.
    """
    import pyarrow.parquet

    table, most = pyarrow.parquet.ParquetFile(path).metadata, 1000
    for number in range(table.num_row_groups):
        group = table.row_group(number)
        columns = [group.column(at) for at in range(group.num_columns)]
        size, packed = (sum(getattr(column, f"total_{how}_size") for column in columns)
                        for how in ("uncompressed", "compressed"))
        if size > max(LONGEST, PACKED_AT_MOST * packed) or size > LONGEST * max(group.num_rows, 1):
            raise InputError(f"{packed / 2**20:,.1f} MB of it unpack to {size / 2**20:,.0f} MB in {group.num_rows:,} "
                             "rows", where=str(path),
                             fix="Is this the right file? If so, write it with smaller row groups.")
        least = 1 if size > PACKED_AT_MOST * packed else 4
        most = min(most, max(least, LONGEST // max(size, 1)))   # equal cells are stored once, so each row may be large
    return most


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
        place, size = Place(name, number, "record"), size_of_value(row)
        if size > LONGEST:
            yield InputError(f"a record has {size / 2**20:,.1f} MB, more than {LONGEST >> 20} MB", fix=DIVIDE), place
        else:
            yield {key: _without_nulls(value) for key, value in row.items()}, place


def _without_nulls(value: object) -> Any:
    """Remove null keys of nested objects, because Arrow gives every row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
