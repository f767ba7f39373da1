"""One file in, its raw records out, each with its place.

A bad line is a value here, not the end of the file: what to do with it is the store's decision. Knows bytes, encodings
and containers (JSON, CSV, tables, text); what a record means is `formats.py`, which files there are is `sources.py`.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from lit_llm.errors import InputError

KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv",
         ".tsv": "csv", ".parquet": "table", ".arrow": "table"}
SEPARATOR = "<|endoftext|>"
SEPARATOR_LINE = re.compile(rf"^{re.escape(SEPARATOR)}$", re.MULTILINE)
_BLANK_OR_COMMA = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record came from: a file, and a line of it (JSON, CSV, text) or a record number (tables, the hub)."""

    path: str
    number: int
    unit: str = "line"
    share: float = field(default=0.0, compare=False)    # of its file read so far, for the time left

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.unit == "line" else f"{self.path}:record {self.number}"


Record = dict[str, Any] | str
Found = tuple[Record | InputError, Place]


def kind_of(path: Path) -> str | None:
    """How a file is read, by its name; None where the name does not say."""
    name = path.name.lower().removesuffix(".gz")
    kind = KINDS.get(Path(name).suffix)
    return None if kind == "table" and path.name.lower().endswith(".gz") else kind


def scan_file(path: Path, *, document: str = "auto") -> Iterator[Found]:
    """Each record of a file, or the reason why it is none, with its place.

    Raises:
        InputError: The file cannot be opened, or what follows cannot be told apart any more.
    """
    match kind_of(path) or "text":
        case "table":
            yield from scan_table(_open_table(path), str(path))
        case "json":
            yield from _json(path)
        case "csv":
            yield from _csv(path)
        case _:
            yield from _text(path, document)


# ---- bytes to lines --------------------------------------------------------------------------------------------------

def _open(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked; refuses UTF-16 by its byte order mark and eats that of UTF-8."""
    try:
        raw: Any = path.open("rb")
        if raw.peek(2)[:2] == b"\x1f\x8b":
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        head = raw.peek(4)[:4]
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _encoding(path, "UTF-16")
    if head[:3] == b"\xef\xbb\xbf":
        raw.read(3)
    return raw


def _encoding(path: Path, name: str, where: str = "") -> InputError:
    return InputError(f"this is {name}, not UTF-8", where=where or str(path),
                      fix=f"Convert it: iconv -f {name} -t UTF-8 '{path.name}' > 'utf8-{path.name}'")


def _decode(raw: bytes, path: Path) -> str:
    """UTF-8 text, or an error that names the likely encoding."""
    if b"\0" in raw:
        odd, even = raw[1::2].count(0), raw[0::2].count(0)
        if max(odd, even) > len(raw) // 8:
            raise _encoding(path, "UTF-16LE" if odd > even else "UTF-16BE")
        raise InputError(f"a NUL byte at byte {raw.index(0) + 1}; text has none", fix="Is this a binary file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start + 1
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        raise InputError(f"not UTF-8: byte {place} is 0x{raw[place - 1]:02x}") from None
    raise InputError(f"not UTF-8 (byte {place}); it reads as GBK",
                     fix=f"If it is: iconv -f GB18030 -t UTF-8 '{path.name}' > 'utf8-{path.name}'")


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their end, with their number from 1."""
    with _open(path) as stream:
        number = 0
        while True:
            try:
                line = stream.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise InputError(f"the file breaks off or is damaged: {error}",
                                 where=f"{path}:{number + 1}") from None
            if not line:
                return
            number += 1
            yield line.removesuffix(b"\n").removesuffix(b"\r"), number


def _whole(path: Path) -> str:
    try:
        with _open(path) as stream:
            raw = stream.read()
        return _decode(raw, path)
    except InputError as error:
        raise error.at(str(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"the file breaks off or is damaged: {error}", where=str(path)) from None


# ---- lines to records ------------------------------------------------------------------------------------------------

def _json(path: Path) -> Iterator[Found]:
    """JSON lines, or one array, or objects spread over lines: told apart by how the file begins."""
    if not _is_lines(path):
        yield from _json_whole(path)
        return
    done, size = 0, max(path.stat().st_size, 1)
    for raw, number in _lines(path):
        done += len(raw) + 1
        if raw.strip():
            yield _json_line(raw, path), Place(str(path), number, share=min(done / size, 1))


def _is_lines(path: Path) -> bool:
    """By the first line that is not blank; a `.json` file may hold JSON lines, too."""
    first = next((raw for raw, _ in _lines(path) if raw.strip()), b"")
    if first.lstrip().startswith(b"["):
        return False
    if ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower():
        return True
    return not isinstance(_json_line(first, path), InputError)


def _json_line(raw: bytes, path: Path) -> Record | InputError:
    try:
        return _record(json.loads(text := _decode(raw, path)), text)
    except InputError as error:
        return error
    except (ValueError, RecursionError) as error:
        return _broken(error)


def _json_whole(path: Path) -> Iterator[Found]:
    """Array elements, or objects one after another, decoded one at a time so that each has its line."""
    text = _whole(path)
    decoder, here, line, counted = json.JSONDecoder(), _BLANK_OR_COMMA.match(text).end(), 1, 0  # type: ignore[union-attr]
    is_array = text[here:here + 1] == "["
    here += is_array
    while True:
        here = _BLANK_OR_COMMA.match(text, here).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, here), here
        place = Place(str(path), line, share=here / max(len(text), 1))
        if here >= len(text):
            if is_array:
                yield InputError("the array is not closed: ']' is missing; was the file cut?"), place
            return
        if is_array and text[here] == "]":
            if text[here + 1:].strip():
                yield InputError("something stands after the array's closing ']'"), place
            return
        try:
            value, end = decoder.raw_decode(text, here)
        except (ValueError, RecursionError) as error:
            yield _broken(error), Place(str(path), getattr(error, "lineno", line))
            return                                      # past a broken element nothing can be trusted
        yield _record(value, text[here:end]), place
        here = end


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
    reader = csv.DictReader(io.StringIO(_whole(path), newline=""), delimiter=delimiter)
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
    text = _whole(path).replace("\r\n", "\n")
    if document == "file" or (document == "auto" and SEPARATOR not in text):
        yield text, Place(str(path), 1)
        return
    if document == "line":
        rows = text.split("\n")
        yield from ((row, Place(str(path), number, share=number / len(rows)))
                    for number, row in enumerate(rows, 1) if row.strip())
        return
    if document == "auto":
        yield from _separated(text, path)
        return
    held: list[str] = []
    for number, row in enumerate([*text.split("\n"), None], start=1):
        if row is None or not row.strip():
            if held:
                yield "\n".join(held), Place(str(path), number - len(held))
            held = []
        else:
            held.append(row)


def _separated(text: str, path: Path) -> Iterator[Found]:
    """What stands between lines that are the separator; its place is its first line that is not blank."""
    start, line, counted = 0, 1, 0
    for stop, after in chain(((found.start(), found.end()) for found in SEPARATOR_LINE.finditer(text)),
                             [(len(text), len(text))]):
        piece = text[start:stop]
        if piece.strip():
            first = stop - len(piece.lstrip())
            line, counted = line + text.count("\n", counted, first), first
            yield piece, Place(str(path), line, share=stop / len(text))
        start = after


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
