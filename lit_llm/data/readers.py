"""One file in, its raw records out, each with its place.

A bad line is a value here, not the end of the file: what to do with it is the store's decision. Files are read as they
are asked for, so their size does not matter. Knows containers (JSON, CSV, tables, text); what a record means is
`formats.py`, which files there are is `sources.py`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_llm.data.textfile import PACKED, blocks, decode, lines
from lit_llm.errors import InputError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".parquet": "table", ".arrow": "table"}
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
_BLANK_OR_COMMA = re.compile(r"[\s,]*")
LONG = 4 << 20                                          # characters of a document that is handed on in blocks
LONGEST = 256 << 20                                     # of a JSON value


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record came from: a file, and a line of it (JSON, CSV, text) or a record number (tables, the hub)."""

    path: str
    number: int
    unit: str = "line"
    share: float = field(default=0.0, compare=False)    # of its file read so far, for the time left

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}:record {self.number}"


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
        InputError: The file cannot be opened, or what follows cannot be told apart any more.
    """
    match kind_of(path) or "text":
        case "table":
            yield from scan_table(_open_table(path), str(path))
        case "json":
            yield from _json(path, parse)
        case "csv":
            yield from _csv(path)
        case _:
            yield from _text(path, document)


# ---- lines to records ------------------------------------------------------------------------------------------------

def _json(path: Path, parse: bool) -> Iterator[Found]:
    """JSON lines, or one array, or objects spread over lines: told apart by how the file begins."""
    if not _is_lines(path):
        yield from _json_whole(path)
        return
    done, size = 0, max(path.stat().st_size, 1)
    for raw, number in lines(path):
        done += len(raw) + 1
        if raw.strip():
            yield parse_line(raw, path, number) if parse else raw, Place(str(path), number, share=min(done / size, 1))


def _is_lines(path: Path) -> bool:
    """By the first line that is not blank; a `.json` file may hold JSON lines, too."""
    first = next((raw for raw, _ in lines(path) if raw.strip()), b"")
    if first.lstrip().startswith(b"["):
        return False
    if ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower():
        return True
    return not isinstance(parse_line(first, path, 1), InputError)


def parse_line(raw: bytes, path: Path, number: int) -> Record | InputError:
    """The object that a JSON line holds, or why it holds none."""
    where = f"{path}:{number}"
    try:
        return _record(json.loads(text := decode(raw, path)), text)
    except InputError as error:
        return error.at(where)
    except (ValueError, RecursionError) as error:
        return _broken(error).at(where)


def _json_whole(path: Path) -> Iterator[Found]:
    """Array elements, or objects one after another, decoded one at a time so that each has its line."""
    stream, decoder = blocks(path), json.JSONDecoder()
    text, here, line, share = "", 0, 1, 0.0
    is_array: bool | None = None

    def skipped() -> int:
        return _BLANK_OR_COMMA.match(text, here).end()  # type: ignore[union-attr]

    while True:
        after = skipped()
        while after == len(text) and (block := next(stream, None)):
            line += text.count("\n", 0, len(text))
            text, here, share = block[0], 0, block[1]
            after = skipped()
        line, text, here = line + text.count("\n", 0, after), text[after:], 0
        place = Place(str(path), line, share=share)
        if not text:
            if is_array:
                yield InputError("the array is not closed: ']' is missing; was the file cut?"), place
            return
        if is_array is None and (is_array := text[0] == "["):
            here = 1
            continue
        if is_array and text[0] == "]":
            if text[1:].strip() or any(more.strip() for more, _ in stream):
                yield InputError("something stands after the array's closing ']'"), place
            return
        while True:
            try:
                value, here = decoder.raw_decode(text)
                break
            except (ValueError, RecursionError) as error:
                more = next(stream, None) if _cut_short(error, text) else None
                if more is None:
                    yield _broken(error), place         # where the next element begins, nobody can say
                    return
                text, share = text + more[0], more[1]
        yield _record(value, text[:here]), place


def _cut_short(error: Exception, text: str) -> bool:
    """Whether a value may only want the text that has not been read yet."""
    if not isinstance(error, json.JSONDecodeError) or len(text) > LONGEST:
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 8


def _broken(error: Exception) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        return InputError(f"not JSON: {error.msg} at column {error.colno}")
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InputError(f"not JSON that can be read: {reason}")


def _record(value: Any, text: str) -> Record | InputError:
    if not isinstance(value, dict):
        return InputError(f"a record must be an object in braces, not {json.dumps(value)[:40]}")
    if "\\ud" in text or "\\uD" in text:                # a pair of escapes is a character; half a pair is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return InputError("half of a surrogate pair (\\ud800 to \\udfff) stands alone; no text has that")
    return value


def _csv(path: Path) -> Iterator[Found]:
    """Rows as strings, verbatim: a data frame would turn 007 into 7 and NA into null."""
    delimiter = "\t" if ".tsv" in path.name.lower() else ","
    reader = csv.DictReader((row for text, _ in blocks(path) for row in io.StringIO(text, newline="")),
                            delimiter=delimiter)
    while True:
        line = reader.line_num + 1
        try:
            row: dict[Any, Any] = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield InputError(f"not CSV: {error}"), Place(str(path), line)
            return
        line = max(line, 2)
        if None in row or None in row.values():
            yield InputError(f"the row does not have the {len(reader.fieldnames or ())} fields of the header"), \
                Place(str(path), line)
        else:
            yield row, Place(str(path), line)


def _text(path: Path, document: str) -> Iterator[Found]:
    """Documents of a text file; what lies between separator lines is kept to the last character."""
    if document == "line":
        yield from ((row, place) for row, place in _rows(path) if row.strip())
    elif document == "paragraph":
        yield from _paragraphs(path)
    else:
        yield from _separated(path, SEPARATOR_LINE if document == "auto" else None)


def _rows(path: Path) -> Iterator[tuple[str, Place]]:
    number = 0
    for text, share in blocks(path):
        for row in text.removesuffix("\n").split("\n"):
            number += 1
            yield row.removesuffix("\r"), Place(str(path), number, share=share)


def _paragraphs(path: Path) -> Iterator[Found]:
    held: list[str] = []
    place = Place(str(path), 1)
    for row, here in _rows(path):
        if row.strip():
            place = place if held else here
            held.append(row)
        elif held:
            yield "\n".join(held), place
            held = []
    if held:
        yield "\n".join(held), place


def _separated(path: Path, separator: re.Pattern[str] | None) -> Iterator[Found]:
    """What stands between separators; its place is its first line that is not blank."""
    stretches = _stretches(path, separator)
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


def _stretches(path: Path, separator: re.Pattern[str] | None) -> Iterator[tuple[str, bool, int, float]]:
    """(text, whether its document ends with it, its first line, share of the file read)."""
    line = 1
    for block, share in blocks(path):
        text = block.replace("\r\n", "\n")
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
        yield dict(row), Place(name, number, "record")
