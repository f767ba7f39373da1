"""One file in, its raw records out, each with its place.

A bad line is a value here, not the end of the file: what to do with it is the store's decision. Files are read as they
are asked for, so their size does not matter. Knows containers (JSON, CSV, tables, text); what a record means is
`formats.py`, which files there are is `sources.py`.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lit_llm.data.textfile import CRLF_NOTE, LONGEST, PACKED, blocks, decode, lines, open_bytes
from lit_llm.errors import InputError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".parquet": "table", ".arrow": "table"}
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
_BLANK_OR_COMMA = re.compile(r"[\s,]*")
LONG = 4 << 20                                          # characters of a document that is handed on in blocks


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
            found = _json(path, notes, parse)
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


# ---- JSON ------------------------------------------------------------------------------------------------------------

def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands twice, Python would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice[:40]}' stands twice in an object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _json(path: Path, notes: set[str], parse: bool) -> Iterator[Found]:
    """JSON lines, or one array, or objects spread over lines: told apart by how the file begins."""
    if not _is_lines(path):
        yield from _json_whole(path, notes)
        return
    done, size = 0, max(path.stat().st_size, 1)
    for raw, number in lines(path, notes):
        done += len(raw) + 1
        if raw.strip():
            yield parse_line(raw, path, number) if parse else raw, Place(str(path), number, share=min(done / size, 1))


def _is_lines(path: Path) -> bool:
    """By the first line that is not blank; a `.json` file may hold JSON lines, too."""
    first = next((raw for raw, _ in lines(path) if raw.strip()), b"").strip()
    if first.startswith(b"[") or first == b"{":
        return False
    if ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower():
        return True
    return not isinstance(parse_line(first, path, 1), InputError)


def parse_line(raw: bytes, path: Path, number: int) -> Record | InputError:
    """The object that a JSON line holds, or why it holds none."""
    where = f"{path}:{number}"
    try:
        text = decode(raw, path, number)
        return _record(DECODER.decode(text), text)
    except InputError as error:
        return error.at(where)
    except (ValueError, RecursionError) as error:
        return _broken(error, text, f"{where}:{getattr(error, 'pos', -1) + 1}")


def _json_whole(path: Path, notes: set[str]) -> Iterator[Found]:
    """Array elements, or objects one after another, decoded one at a time so that each has its line."""
    stream, text, here, share = blocks(path, notes, whole_lines=False), "", 0, 0.0
    line, column, counted, last = 1, 1, 0, 0            # of text[counted]; the last record's line
    is_array: bool | None = None
    while True:
        here = _BLANK_OR_COMMA.match(text, here).end()  # type: ignore[union-attr]
        while here == len(text) and (block := next(stream, None)):
            line, column = _moved(text[counted:], line, column)
            (text, share), counted = block, 0
            here = _BLANK_OR_COMMA.match(text).end()    # type: ignore[union-attr]
        line, column = _moved(text[counted:here], line, column)
        counted = here
        where = f"{path}:{line}:{column}"
        if here == len(text):
            if is_array:
                raise InputError("the array is not closed: ']' is missing; was the file cut?", where=where)
            return
        if is_array is None and (is_array := text[here] == "["):
            here += 1
            continue
        if is_array and text[here] == "]":
            if text[here + 1:].strip() or any(more.strip() for more, _ in stream):
                raise InputError("something stands after the array's closing ']'", where=where)
            return
        while True:
            try:
                value, end = DECODER.raw_decode(text, here)
                break
            except (ValueError, RecursionError) as error:
                more = _as_much(stream, len(text) - here) if _cut_short(error, text, here) else []
                if not more:                            # where the next element begins, nobody can say
                    line, column = _moved(text[here:getattr(error, "pos", here)], line, column)
                    raise _broken(error, text, f"{path}:{line}:{column}") from None
                text, share = text[here:] + "".join(block for block, _ in more), more[-1][1]
                here = counted = 0
        place = Place(str(path), line, share=share, column=column if line == last else 0)
        yield _record(value, text[here:end]), place
        here, last = end, line


def _as_much(stream: Iterator[tuple[str, float]], size: int) -> list[tuple[str, float]]:
    """Blocks of at least this size in all: a long value is tried again at twice its length, not at each block."""
    more: list[tuple[str, float]] = []
    for block in stream:
        more.append(block)
        size -= len(block[0])
        if size <= 0:
            break
    return more


def _moved(passed: str, line: int, column: int) -> tuple[int, int]:
    """Line and column after some text."""
    if newlines := passed.count("\n"):
        return line + newlines, len(passed) - passed.rfind("\n")
    return line, column + len(passed)


def _cut_short(error: Exception, text: str, here: int) -> bool:
    """Whether a value may only want the text that has not been read yet."""
    if not isinstance(error, json.JSONDecodeError) or len(text) - here > LONGEST:
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 8


def _broken(error: Exception, text: str, where: str) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        begin = max(0, error.pos - 20)
        near = text[begin:error.pos + 20].encode("unicode_escape").decode()
        reason = error.msg.removesuffix(" at")
        return InputError(f"not JSON: {reason}", where=where, fix=f"It stands near '{near}'." if near else "")
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InputError(f"not JSON that can be read: {reason}", where=where.rpartition(":")[0])


def _record(value: Any, text: str) -> Record | InputError:
    if not isinstance(value, dict):
        return InputError(f"a record must be an object in braces, not {json.dumps(value)[:40]}")
    if "\\ud" in text or "\\uD" in text:                # a pair of escapes is a character; half a pair is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return InputError("half of a surrogate pair (\\ud800 to \\udfff) stands alone; no text has that",
                              fix="Was the text cut within an emoji? Take the half out.")
    return value


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
