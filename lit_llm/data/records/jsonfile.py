"""Read a JSON file as records: one object per line, one array, or objects that span lines.

An array is decoded one element at a time, so a file may be larger than memory and each element has its line number. A
line without an object becomes an error with its place, and reading continues with the next line.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_llm.data.records.record import Found, Place, Record, shown
from lit_llm.data.records.textfile import BLOCK, DAMAGE, LONGEST, blocks, decode, lines, open_bytes
from lit_llm.errors import InputError

_BLANK_OR_COMMA = re.compile(r"[\s,]*")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse duplicate keys, of which Python would silently keep the last."""
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen = Counter(name for name, _ in pairs)
        twice = next(name for name, count in seen.items() if count > 1)
        raise ValueError(f"the key '{twice[:40]}' occurs twice in an object")
    return unique


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def scan_json(path: Path, notes: set[str], parse: bool) -> Iterator[Found]:
    """JSON lines, or one array, or objects spread over lines: detected from the start of the file."""
    if not _is_lines(path):
        yield from _whole(path, notes)
        return
    done, size = 0, max(path.stat().st_size, 1)
    for raw, number in lines(path, notes):
        done += 1 if isinstance(raw, InputError) else len(raw) + 1
        yield parse_line(raw, path, number) if parse else raw, Place(str(path), number, share=min(done / size, 1))


def _is_lines(path: Path) -> bool:
    """Detect JSON lines by the first line that is not blank; a `.json` file may contain them as well."""
    begins = _begins(path)
    if begins.startswith(b"[") or begins.partition(b"\n")[0].strip() == b"{":       # possibly a whole file in one line
        return False
    if ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower():
        return True
    first, _ = next(lines(path), (b"", 1))
    return isinstance(first, InputError) or not isinstance(parse_line(first.strip(), path, 1), InputError)


def _begins(path: Path) -> bytes:
    with open_bytes(path) as stream:
        try:
            return stream.read(BLOCK).lstrip()
        except DAMAGE:                                  # reading the records will report the place
            return b""


def parse_line(raw: bytes | InputError, path: Path, number: int) -> Record | InputError:
    """The object of a JSON line, or the error."""
    where = f"{path}:{number}"
    if isinstance(raw, InputError):
        return raw
    try:
        text = decode(raw, path, number)
        return _record(DECODER.decode(text), text)
    except InputError as error:
        return error.at(where)
    except (ValueError, RecursionError) as error:
        return _broken(error, text, f"{where}:{getattr(error, 'pos', -1) + 1}")


def _whole(path: Path, notes: set[str]) -> Iterator[Found]:
    """Array elements, or objects one after another, decoded one at a time so that each has its line number."""
    stream, text, here, share = blocks(path, notes, ends="any"), "", 0, 0.0
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
                raise InputError("the array is not closed: ']' is missing; was the file truncated?", where=where)
            return
        if is_array is None and (is_array := text[here] == "["):
            here += 1
            continue
        if is_array and text[here] == "]":
            if text[here + 1:].strip() or any(more.strip() for more, _ in stream):
                raise InputError("there is content after the array's closing ']'", where=where)
            return
        while True:
            try:
                value, end = DECODER.raw_decode(text, here)
                break
            except (ValueError, RecursionError) as error:
                short = _cut_short(error, text)
                if short and len(text) - here > LONGEST:
                    raise InputError(f"a value is larger than {LONGEST >> 20} MB", where=where, fix="Is a quote or a "
                                     "bracket not closed? Otherwise split the record.") from None
                more = _as_much(stream, len(text) - here) if short else []
                if not more:                            # the start of the next element is unknown
                    line, column = _moved(text[here:getattr(error, "pos", here)], line, column)
                    raise _broken(error, text, f"{path}:{line}:{column}") from None
                text, share = text[here:] + "".join(block for block, _ in more), more[-1][1]
                here = counted = 0
        place = Place(str(path), line, share=share, column=column if line == last else 0)
        yield _record(value, text[here:end]), place
        here, last = end, line


def _as_much(stream: Iterator[tuple[str, float]], size: int) -> list[tuple[str, float]]:
    """Blocks of at least this total size: a long value is retried at twice its length, not at each block."""
    more: list[tuple[str, float]] = []
    for block in stream:
        more.append(block)
        size -= len(block[0])
        if size <= 0:
            break
    return more


def _moved(passed: str, line: int, column: int) -> tuple[int, int]:
    """Line and column after a text."""
    if newlines := passed.count("\n"):
        return line + newlines, len(passed) - passed.rfind("\n")
    return line, column + len(passed)


def _cut_short(error: Exception, text: str) -> bool:
    """Whether an error may be due to text that has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()) - 8


def _broken(error: Exception, text: str, where: str) -> InputError:
    if isinstance(error, json.JSONDecodeError):
        begin = max(0, error.pos - 20)
        near = text[begin:error.pos + 20].encode("unicode_escape").decode()
        reason = error.msg.removesuffix(" at")
        return InputError(f"not JSON: {reason}", where=where, fix=f"It is near '{near}'." if near else "")
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return InputError(f"the JSON cannot be parsed: {reason}", where=where.rpartition(":")[0])


def _record(value: object, text: str) -> Record | InputError:
    if not isinstance(value, dict):
        return InputError(f"a record must be an object in braces, not {shown(value)}")
    if "\\ud" in text or "\\uD" in text:                # a pair of escapes is a character, half a pair is not
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return InputError("the text contains a lone surrogate (\\ud800 to \\udfff), which is not a character",
                              fix="Was the text cut within an emoji? Remove the surrogate.")
    return value
