"""Files that are complete or not there, whenever the process or the machine dies."""

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("no space left", "disk quota exceeded", "os error 28", "file too large", "pytorchstreamwriter failed",
              "] . unexpected pos ")                    # torch, of a file that became longer than the disk
GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ENODEV)
GIB = 2**30


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all that is kept to be faster next time."""
    return Path(cache_dir or os.environ.get("LIT_LLM_CACHE") or "~/.cache/lit_llm").expanduser()


def is_full(error: BaseException) -> bool:
    """Whether an error of Python, torch or a library in Rust says that a disk is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(words in str(error).lower() for words in FULL_WORDS)


def number_of(error: BaseException) -> int:
    """The system's number of an error: that of a full disk for every library's words for it, 0 if there is none."""
    return errno.ENOSPC if is_full(error) else getattr(error, "errno", None) or 0


def said(error: BaseException | None) -> str:
    """An error in one line; empty where there is none."""
    if error is None:
        return ""
    if is_full(error) and not isinstance(error, OSError):
        return "the disk is full"
    text = str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
    name = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return " ".join(text.split())[:200] + name if text.strip() else type(error).__name__


def free(folder: Path) -> str:
    """How much room there is, in words; of the nearest folder above where this one is gone."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / GIB:.2f} GiB are free"


def remedy(error: BaseException, folder: Path) -> str:
    """What to do about an error of writing into a folder, as the first half of a sentence."""
    if is_full(error):
        return "make room"
    if not folder.is_dir() or (isinstance(error, OSError) and error.errno in GONE):
        return "it is gone: if it was moved, move it back; if its disk is gone, bring that back"
    return "see that it can be written"


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(file: Path, text: str) -> None:
    """Write a file in one move: a reader sees the old text or the new, never a part. Its folder is made if absent."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.partial")
    try:
        with open(fresh, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
        sync(fresh)
        os.replace(fresh, file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def replace_folder(fresh: Path, folder: Path) -> None:
    """Give a finished folder its name; what had that name is gone."""
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)
    sync(folder.parent)
