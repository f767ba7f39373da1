"""Read the text of one file in lines, or in blocks that end with a line: never the whole file at once.

Knows packing (gzip, zstd) and encodings: UTF-8 is read, others are named; what is mended is added to the caller's
`notes`. `readers.py` and `jsonfile.py` read records from the text.

What is held at a time is bounded: by `LONGEST` for a line, which is one record or a part of one. Packed files may hold
much more than their size says, so what is only skipped is bounded, too.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lit_llm.errors import InputError

BLOCK = 1 << 20                                         # bytes, up to the next line end
LONGEST = 64 << 20                                      # bytes of a line, of a JSON value, of a CSV row, of a cell
SKIPPED = 1 << 30                                       # bytes of a line after which the file is given up
BLANK = 10_000_000                                      # blank lines in a row
BUFFER = 1 << 17                                       # bytes that are unpacked at a time
DIVIDE = "Divide the record into several, or leave it out (data.on_bad_record: quarantine)."
TAIL = 64                                               # bytes that are held back where a line is torn
PACKED = (".gz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error)
BOM_NOTE, CRLF_NOTE = "byte order mark taken away", "CRLF line ends made LF"
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def open_bytes(path: Path, notes: set[str] | None = None) -> BinaryIO:
    """The bytes of a file, unpacked by what they are; refuses UTF-16 by its byte order mark and eats that of UTF-8.

    Raises:
        InputError: It cannot be opened, or stands for data that is elsewhere.
    """
    try:
        raw: Any = path.open("rb")
        head = raw.peek(4)[:4]
        if head[:2] == b"\x1f\x8b":
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw), BUFFER)
        elif head == b"\x28\xb5\x2f\xfd":
            import pyarrow

            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), BUFFER)
        head = raw.peek(64)[:64]
    except DAMAGE as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            raise _encoding(path, name)
    if head.startswith(b"version https://git-lfs.github.com"):
        raise InputError("this is a pointer of Git LFS, not the data it stands for", where=str(path),
                         fix="Fetch the data: git lfs pull")
    if head.startswith(b"\xef\xbb\xbf"):
        raw.read(3)
        if notes is not None:
            notes.add(BOM_NOTE)
    return raw


def decode(raw: bytes, path: Path, line: int = 1) -> str:
    """UTF-8 text, or an error at its line and column that names the likely encoding; `line` is the first one's."""
    if b"\0" in raw:
        many = raw.count(0) > len(raw) // 8             # half of ASCII's bytes, few of Chinese
        if (many or not _is_utf8(raw)) and (name := _utf16(raw)):
            raise _encoding(path, name)
        raise InputError("a NUL byte; text has none", where=_spot(raw, raw.index(0), path, line),
                         fix="Is this a binary file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where, what = _spot(raw, error.start, path, line), f"not UTF-8: byte 0x{raw[error.start]:02x}"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        raise InputError(what, where=where, fix=f"If the whole file has another encoding, convert it: iconv -f CP1252 "
                         f"-t UTF-8 '{path.name}' > 'utf8-{path.name}' (CP1252 is Western Windows').") from None
    raise InputError(f"{what}; it reads as GBK", where=where,
                     fix=f"If it is: iconv -f GB18030 -t UTF-8 '{path.name}' > 'utf8-{path.name}' "
                     "(Big5 and Shift-JIS can look the same)")


def _is_utf8(raw: bytes) -> bool:
    try:
        return bool(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _utf16(raw: bytes) -> str | None:
    """Which order of bytes gives text: ASCII counts most, since read the other way it gives rare ideographs."""
    def share(name: str) -> float:
        text = raw[:4096].decode(name, errors="ignore")
        latin = sum("\t" <= char <= "~" for char in text)
        wide = sum("\u3000" <= char <= "\u9fff" or "\uff00" <= char <= "\uffef" for char in text)
        return (2 * latin + wide) / len(text) if text else 0.0

    best = max(("UTF-16LE", "UTF-16BE"), key=share)
    return best if share(best) > 0.9 else None


def _spot(raw: bytes, at: int, path: Path, line: int) -> str:
    """`file:line:column`; columns are characters, from 1."""
    begin = raw.rfind(b"\n", 0, at) + 1
    column = len(raw[begin:at].decode("utf-8", errors="replace")) + 1
    return f"{path}:{line + raw.count(10, 0, at)}:{column}"


def _encoding(path: Path, name: str) -> InputError:
    return InputError(f"this is {name}, not UTF-8", where=str(path),
                      fix=f"Convert it: iconv -f {name} -t UTF-8 '{path.name}' > 'utf8-{path.name}'")


def lines(path: Path, notes: set[str] | None = None) -> Iterator[tuple[bytes | InputError, int]]:
    """Lines that are not blank, without their end, with their number from 1; an error for one longer than `LONGEST`.

    Raises:
        InputError: The file is damaged, or has `BLANK` blank lines in a row.
    """
    with open_bytes(path, notes) as stream:
        number = last = 0                               # of the last line that is not blank
        while line := _read_line(stream, path, number + 1):
            number += 1
            if isinstance(line, InputError) or not line.isspace():
                last = number
                yield line if isinstance(line, InputError) else line.removesuffix(b"\n").removesuffix(b"\r"), number
                continue
            number += _blank_ahead(stream, path, number).count(b"\n")
            refuse_blank(number - last, path, number)


def refuse_blank(count: int, path: Path, number: int) -> None:
    """Refuse a file with very many blank lines in a row: a packed one of a megabyte may hold a billion of them.

    Raises:
        InputError: There are more than `BLANK`.
    """
    if count > BLANK:
        raise InputError(f"more than {BLANK:,} blank lines in a row", where=f"{path}:{number}",
                         fix="Is this the right file? If so, take them out.")


def _blank_ahead(stream: BinaryIO, path: Path, number: int) -> bytes:
    """Blank lines that are in the buffer already, read at once: a packed file may hold millions of them."""
    try:
        ahead = stream.peek(1)                          # type: ignore[attr-defined]
        blank = ahead[:len(ahead) - len(ahead.lstrip())]
        return stream.read(blank.rfind(b"\n") + 1)
    except DAMAGE as error:
        raise _damaged(error, path, number) from None


def blocks(path: Path, notes: set[str] | None = None, *,
           ends: Literal["line", "torn", "any"] = "line") -> Iterator[tuple[str, float]]:
    """Decoded text, about a megabyte at a time, with the share of the file that has been read.

    Args:
        path: The file.
        notes: What is mended is added to it.
        ends: Where a block ends: behind a line (a line longer than `LONGEST` is an error); behind a line, or within one
            that is longer than a block, never near its ends; or anywhere.
    """
    size, done, line, held = max(path.stat().st_size, 1), 0, 1, b""
    with open_bytes(path, notes) as stream:
        while True:
            rest: bytes | InputError = b""
            try:
                raw = stream.read(BLOCK)
                inside = len(raw) == BLOCK and not raw.endswith(b"\n")
                if inside and ends == "torn":
                    rest = stream.readline(BLOCK + TAIL)
            except DAMAGE as error:
                raise _damaged(error, path, line) from None
            if not raw and not held:
                return
            if inside and ends == "line":
                rest = _read_line(stream, path, line + raw.count(10))
            if isinstance(rest, InputError):            # where a CSV file's next row begins, nobody can say
                raise rest
            torn = ends == "torn" and len(rest) == BLOCK + TAIL and not rest.endswith(b"\n")
            whole = len(raw) < BLOCK or (ends != "any" and not torn)
            done, raw = done + len(raw) + len(rest), held + raw + rest
            cut = len(raw) if whole else _character_end(raw[:-TAIL] if torn else raw)
            raw, held = raw[:cut], raw[cut:]
            text = decode(raw, path, line)
            line += text.count("\n")
            yield text, min(done / size, 1.0)


def _character_end(raw: bytes) -> int:
    """Where to cut so that no character of UTF-8 is torn: behind the last whole one."""
    for back in range(1, 4):
        if raw[-back] >= 0xC0:                          # a first byte; it says how many there are
            return len(raw) - back if raw[-back] >= (0xC0, 0xE0, 0xF0)[back - 1] else len(raw)
        if raw[-back] < 0x80:
            break
    return len(raw)


def _read_line(stream: BinaryIO, path: Path, number: int) -> bytes | InputError:
    """A line with its end; of one that is too long, an error with its size, and the rest of it is skipped."""
    try:
        line = stream.readline(LONGEST)
        if len(line) < LONGEST or line.endswith(b"\n"):
            return line
        size, line = len(line), b""
        while size < SKIPPED and (more := stream.readline(BLOCK)):
            size += len(more)
            if more.endswith(b"\n"):
                break
    except DAMAGE as error:
        raise _damaged(error, path, number) from None
    where = f"{path}:{number}"
    if size >= SKIPPED:
        raise InputError(f"a line does not end within {size >> 20:,} MB", where=where, fix="Is this text?")
    return InputError(f"a line of more than {LONGEST >> 20} MB, {size / 2**20:,.1f} MB", where=where, fix=DIVIDE)


def _damaged(error: Exception, path: Path, line: int) -> InputError:
    return InputError(f"the file breaks off or is damaged: {error}", where=f"{path}:{line}",
                      fix="Was it copied or downloaded whole?")
