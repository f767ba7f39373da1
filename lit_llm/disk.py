"""Files that are complete or not there, whenever the process or the machine dies."""

import os
import shutil
from pathlib import Path


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
