"""The bytes of one file in, its text out, in lines or in blocks that end with a line: never the whole file at once.

Knows packing (gzip, zstd) and encodings: UTF-8 is read, others are named. What the text means is `readers.py`'s.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lit_llm.errors import InputError

BLOCK = 1 << 20                                         # bytes, up to the next line end
PACKED = (".gz", ".zst")
DAMAGE = (OSError, EOFError, zlib.error)


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked by what they are; refuses UTF-16 by its byte order mark and eats that of UTF-8."""
    try:
        raw: Any = path.open("rb")
        head = raw.peek(4)[:4]
        if head[:2] == b"\x1f\x8b":
            raw = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        elif head == b"\x28\xb5\x2f\xfd":
            import pyarrow

            raw = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        head = raw.peek(4)[:4]
    except DAMAGE as error:
        raise InputError(f"cannot be read: {error}", where=str(path)) from None
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _encoding(path, "UTF-16")
    if head[:3] == b"\xef\xbb\xbf":
        raw.read(3)
    return raw


def decode(raw: bytes, path: Path, begin: int = 0) -> str:
    """UTF-8 text, or an error that names the likely encoding; `begin` is the number of bytes before these."""
    if b"\0" in raw:
        odd, even = raw[1::2].count(0), raw[0::2].count(0)
        if max(odd, even) > len(raw) // 8:
            raise _encoding(path, "UTF-16LE" if odd > even else "UTF-16BE")
        raise InputError(f"a NUL byte at byte {begin + raw.index(0) + 1}; text has none", fix="Is this a binary file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = error.start
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        raise InputError(f"not UTF-8: byte {begin + place + 1} is 0x{raw[place]:02x}") from None
    raise InputError(f"not UTF-8 (byte {begin + place + 1}); it reads as GBK",
                     fix=f"If it is: iconv -f GB18030 -t UTF-8 '{path.name}' > 'utf8-{path.name}'")


def _encoding(path: Path, name: str) -> InputError:
    return InputError(f"this is {name}, not UTF-8", where=str(path),
                      fix=f"Convert it: iconv -f {name} -t UTF-8 '{path.name}' > 'utf8-{path.name}'")


def lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Lines without their end, with their number from 1."""
    with open_bytes(path) as stream:
        number = 0
        while True:
            try:
                line = stream.readline()
            except DAMAGE as error:
                raise InputError(f"the file breaks off or is damaged: {error}",
                                 where=f"{path}:{number + 1}") from None
            if not line:
                return
            number += 1
            yield line.removesuffix(b"\n").removesuffix(b"\r"), number


def blocks(path: Path) -> Iterator[tuple[str, float]]:
    """Decoded text, about a megabyte at a time and up to a line end, with the share of the file that has been read."""
    size, done = max(path.stat().st_size, 1), 0
    with open_bytes(path) as stream:
        while True:
            try:
                raw = stream.read(BLOCK)
                raw += stream.readline() if len(raw) == BLOCK else b""
            except DAMAGE as error:
                raise InputError(f"the file breaks off or is damaged: {error}", where=str(path)) from None
            if not raw:
                return
            try:
                text = decode(raw, path, done)
            except InputError as error:
                raise error.at(str(path)) from None
            done += len(raw)
            yield text, min(done / size, 1.0)
