"""Read the text of one file in lines, or in blocks that end with a line: never the whole file at once.

Knows packing (gzip, zstd) and encodings: UTF-8 is read, others are named; what is mended is added to the caller's
`notes`. `readers.py` and `jsonfile.py` read records from the text.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lit_llm.errors import InputError

BLOCK = 1 << 20                                         # bytes, up to the next line end
LONGEST = 256 << 20                                     # bytes of a line, of a JSON value, of a CSV field
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
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif head == b"\x28\xb5\x2f\xfd":
            import pyarrow

            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
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


def lines(path: Path, notes: set[str] | None = None) -> Iterator[tuple[bytes, int]]:
    """Lines without their end, with their number from 1."""
    with open_bytes(path, notes) as stream:
        number = 0
        while line := _read_line(stream, path, number + 1):
            number += 1
            yield line.removesuffix(b"\n").removesuffix(b"\r"), number


def blocks(path: Path, notes: set[str] | None = None, *,
           whole_lines: bool = True) -> Iterator[tuple[str, float]]:
    """Decoded text, about a megabyte at a time, with the share of the file that has been read.

    Args:
        path: The file.
        notes: What is mended is added to it.
        whole_lines: End each block with a line; JSON may be one line of any length.
    """
    size, done, line, held = max(path.stat().st_size, 1), 0, 1, b""
    with open_bytes(path, notes) as stream:
        while True:
            try:
                raw = stream.read(BLOCK)
            except DAMAGE as error:
                raise _damaged(error, path, line) from None
            if not raw and not held:
                return
            if whole_lines and len(raw) == BLOCK and not raw.endswith(b"\n"):
                raw += _read_line(stream, path, line + raw.count(10))
            done, raw = done + len(raw), held + raw
            cut = len(raw) if whole_lines or len(raw) < BLOCK else _character_end(raw)
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


def _read_line(stream: BinaryIO, path: Path, number: int) -> bytes:
    try:
        line = stream.readline(LONGEST)
    except DAMAGE as error:
        raise _damaged(error, path, number) from None
    if len(line) == LONGEST:
        raise InputError(f"a line of more than {LONGEST >> 20} MB", where=f"{path}:{number}",
                         fix="Is this text? If so, give it line ends.")
    return line


def _damaged(error: Exception, path: Path, line: int) -> InputError:
    return InputError(f"the file breaks off or is damaged: {error}", where=f"{path}:{line}",
                      fix="Was it copied or downloaded whole?")
