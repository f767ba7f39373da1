"""Write files and folders atomically: after a crash they are complete or absent."""

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("no space left", "disk quota exceeded", "os error 28", "file too large", "pytorchstreamwriter failed",
              "] . unexpected pos ")                    # torch, for a file larger than the disk
GONE = (errno.ENOENT, errno.ESTALE, errno.ENOTCONN, errno.EIO, errno.ENODEV)
GIB = 2**30


def cache_root(cache_dir: str | None) -> Path:
    """The folder of all caches."""
    return Path(cache_dir or os.environ.get("LIT_LLM_CACHE") or "~/.cache/lit_llm").expanduser()


def is_full(error: BaseException) -> bool:
    """Whether an error of Python, torch or a Rust library means a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    return any(words in str(error).lower() for words in FULL_WORDS)


def number_of(error: BaseException) -> int:
    """The errno of an error; ENOSPC for every library's message about a full disk; 0 if there is none."""
    return errno.ENOSPC if is_full(error) else getattr(error, "errno", None) or 0


def reason(error: BaseException | None) -> str:
    """An error in one line; empty if there is none."""
    if error is None:
        return ""
    if is_full(error) and not isinstance(error, OSError):
        return "the disk is full"
    text = str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
    name = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return " ".join(text.split())[:200] + name if text.strip() else type(error).__name__


def free(folder: Path) -> str:
    """Description of the free space, of the nearest existing parent folder."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / GIB:.2f} GiB are free"


def remedy(error: BaseException, folder: Path) -> str:
    """Advice about an error of writing into a folder, as the first half of a sentence."""
    if is_full(error):
        return "free some space"
    if not folder.is_dir() or (isinstance(error, OSError) and error.errno in GONE):
        return "it no longer exists: move it back, or mount its disk again"
    return "make sure that it is writable"


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(file: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the new text. Its folder is created if necessary."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f"{file.name}.{os.getpid()}.partial")    # another process may write the same file
    try:
        with open(fresh, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
        sync(fresh)
        os.replace(fresh, file)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


def replace_folder(fresh: Path, folder: Path) -> None:
    """Rename a finished folder to its final name, and remove what had that name."""
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(fresh, folder)
    sync(folder.parent)


def share(folder: Path) -> None:
    """Give all files of a folder the mode of new files; safetensors writes its files for their owner alone."""
    probe = folder / f".{os.getpid()}.mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)
