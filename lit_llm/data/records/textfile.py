"""Read the text of one file in lines or in blocks of lines, never the whole file at once.

It handles compression (gzip, zstd) and encodings: UTF-8 is read, others are named in the error; corrections are added
to the caller's `notes`. `readers.py` and `jsonfile.py` read records from the text. Memory is bounded by `LONGEST` per
line, which is a record or a part of one. Compressed files may be much larger than their size suggests, so skipping is
bounded as well.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

from lit_llm.errors import InputError

BLOCK = 1 << 20                                         # bytes, up to the next line end
LONGEST = 64 << 20                                      # limit in bytes of a line, a JSON value, a CSV row, a cell
SKIPPED = 1 << 30                                       # bytes of a line after which reading the file stops
BLANK = 10_000_000                                      # consecutive blank lines
BUFFER = 1 << 17                                       # bytes that are decompressed at a time
DIVIDE = "Split the record into several, or leave it out (data.on_bad_record: quarantine)."
TAIL = 64                                               # bytes that stay unread when a line is split
PACKED = (".gz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error)
BOM_NOTE, CRLF_NOTE = "byte order mark removed", "CRLF line ends converted to LF"
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def open_bytes(path: Path, notes: set[str] | None = None) -> BinaryIO:
    """Open a file, decompressed by its content; refuses UTF-16 by its byte order mark and skips that of UTF-8.

    Raises:
        InputError: It cannot be opened, or it is only a pointer to the data.
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
        raise InputError(f"the file cannot be read: {error}", where=str(path)) from None
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            raise _encoding(path, name)
    if head.startswith(b"version https://git-lfs.github.com"):
        raise InputError("this is a Git LFS pointer, not the data", where=str(path),
                         fix="Fetch the data: git lfs pull")
    if head.startswith(b"\xef\xbb\xbf"):
        raw.read(3)
        if notes is not None:
            notes.add(BOM_NOTE)
    return raw


def decode(raw: bytes, path: Path, line: int = 1) -> str:
    """UTF-8 text, or an error at its line and column that names the likely encoding; `line` is the first one's."""
    if b"\0" in raw:
        many = raw.count(0) > len(raw) // 8             # half of the bytes of ASCII, few of Chinese
        if (many or not _is_utf8(raw)) and (name := _utf16(raw)):
            raise _encoding(path, name)
        raise InputError("a NUL byte, which text does not contain", where=_spot(raw, raw.index(0), path, line),
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
    """The byte order that gives text: ASCII counts most, because the other order gives rare ideographs."""
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
    """Yield lines that are not blank, without line end, with their number; an error for one above `LONGEST`.

    Raises:
        InputError: The file is damaged, or has `BLANK` consecutive blank lines.
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
    """Refuse a file with very many consecutive blank lines: a compressed megabyte may contain a billion.

    Raises:
        InputError: There are more than `BLANK`.
    """
    if count > BLANK:
        raise InputError(f"more than {BLANK:,} consecutive blank lines", where=f"{path}:{number}",
                         fix="Is this the right file? If so, remove them.")


def _blank_ahead(stream: BinaryIO, path: Path, number: int) -> bytes:
    """Skip buffered blank lines at once: a compressed file may contain millions of them."""
    try:
        ahead = stream.peek(1)                          # type: ignore[attr-defined]
        blank = ahead[:len(ahead) - len(ahead.lstrip())]
        return stream.read(blank.rfind(b"\n") + 1)
    except DAMAGE as error:
        raise _damaged(error, path, number) from None


def blocks(path: Path, notes: set[str] | None = None, *,
           ends: Literal["line", "torn", "any"] = "line") -> Iterator[tuple[str, float]]:
    """Yield decoded text, about a megabyte at a time, with the share of the file that has been read.

    Args:
        path: The file.
        notes: Corrections are added to it.
        ends: Where a block ends: after a line (a line longer than `LONGEST` is an error); after a line, or within one
            that is longer than a block, never near its ends; or anywhere.
    """
    size, done, line, pending = max(path.stat().st_size, 1), 0, 1, b""
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
            if not raw and not pending:
                return
            if inside and ends == "line":
                rest = _read_line(stream, path, line + raw.count(10))
            if isinstance(rest, InputError):            # the start of a CSV file's next row is unknown
                raise rest
            torn = ends == "torn" and len(rest) == BLOCK + TAIL and not rest.endswith(b"\n")
            whole = len(raw) < BLOCK or (ends != "any" and not torn)
            done, raw = done + len(raw) + len(rest), pending + raw + rest
            cut = len(raw) if whole else _character_end(raw[:-TAIL] if torn else raw)
            raw, pending = raw[:cut], raw[cut:]
            text = decode(raw, path, line)
            line += text.count("\n")
            yield text, min(done / size, 1.0)


def _character_end(raw: bytes) -> int:
    """Where to split without splitting a UTF-8 character: after the last complete one."""
    for back in range(1, 4):
        if raw[-back] >= 0xC0:                          # a first byte, which gives the length
            return len(raw) - back if raw[-back] >= (0xC0, 0xE0, 0xF0)[back - 1] else len(raw)
        if raw[-back] < 0x80:
            break
    return len(raw)


def _read_line(stream: BinaryIO, path: Path, number: int) -> bytes | InputError:
    """Read a line with its end; a line that is too long is skipped and becomes an error with its size."""
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
    return InputError(f"a line has {size / 2**20:,.1f} MB, more than {LONGEST >> 20} MB", where=where, fix=DIVIDE)


def _damaged(error: Exception, path: Path, line: int) -> InputError:
    return InputError(f"the file is truncated or damaged: {error}", where=f"{path}:{line}",
                      fix="Was it copied or downloaded completely?")
