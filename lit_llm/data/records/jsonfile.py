"""Read a JSON file as records: one object a line, one array, or objects that spread over lines.

An array is decoded one element at a time, so a file may be larger than memory and each element has its line. A line
that holds no object is given as an error with its place, and the lines that follow are read all the same.
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
    """An object; of a key that stands twice, Python would keep the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = Counter(name for name, _ in pairs)
        twice = next(name for name, count in seen.items() if count > 1)
        raise ValueError(f"the key '{twice[:40]}' stands twice in an object")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


def scan_json(path: Path, notes: set[str], parse: bool) -> Iterator[Found]:
    """JSON lines, or one array, or objects spread over lines: told apart by how the file begins."""
    if not _is_lines(path):
        yield from _whole(path, notes)
        return
    done, size = 0, max(path.stat().st_size, 1)
    for raw, number in lines(path, notes):
        done += 1 if isinstance(raw, InputError) else len(raw) + 1
        yield parse_line(raw, path, number) if parse else raw, Place(str(path), number, share=min(done / size, 1))


def _is_lines(path: Path) -> bool:
    """By the first line that is not blank; a `.json` file may hold JSON lines, too."""
    begins = _begins(path)
    if begins.startswith(b"[") or begins.partition(b"\n")[0].strip() == b"{":       # perhaps all of it in one line
        return False
    if ".jsonl" in path.name.lower() or ".ndjson" in path.name.lower():
        return True
    first, _ = next(lines(path), (b"", 1))
    return isinstance(first, InputError) or not isinstance(parse_line(first.strip(), path, 1), InputError)


def _begins(path: Path) -> bytes:
    with open_bytes(path) as stream:
        try:
            return stream.read(BLOCK).lstrip()
        except DAMAGE:                                  # who reads the records will name the place
            return b""


def parse_line(raw: bytes | InputError, path: Path, number: int) -> Record | InputError:
    """The object that a JSON line holds, or why it holds none."""
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
    """Array elements, or objects one after another, decoded one at a time so that each has its line."""
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
                short = _cut_short(error, text)
                if short and len(text) - here > LONGEST:
                    raise InputError(f"a value of more than {LONGEST >> 20} MB", where=where, fix="Is a quote or a "
                                     "bracket left open? Else divide the record into several.") from None
                more = _as_much(stream, len(text) - here) if short else []
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


def _cut_short(error: Exception, text: str) -> bool:
    """Whether a value may only want the text that has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
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
        return InputError(f"a record must be an object in braces, not {shown(value)}")
    if "\\ud" in text or "\\uD" in text:                # a pair of escapes is a character; half a pair is none
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return InputError("half of a surrogate pair (\\ud800 to \\udfff) stands alone; no text has that",
                              fix="Was the text cut within an emoji? Take the half out.")
    return value
