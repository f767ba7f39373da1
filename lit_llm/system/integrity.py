"""Detect changes to the files of a checkpoint, by its `manifest.json`.

Every reader of a checkpoint's weights uses it: resuming, evaluation, export and chat.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError

NAME = "manifest.json"
FIX = "use another checkpoint of the run, or an intact copy of this one"


def sha256(file: Path) -> str:
    """sha256 of a file's content."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        InputError: There is none, or it is damaged.
    """
    try:
        facts: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
        _listed(folder, facts)
    except FileNotFoundError:
        raise InputError(f"{folder} has no {NAME}, so it was never completed", where="checkpoint", fix=FIX) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{folder / NAME} is damaged", where="checkpoint", fix=FIX) from None
    return facts


def _listed(folder: Path, facts: dict[str, Any], part: str = "") -> dict[Path, tuple[int, str]]:
    return {folder / name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in facts["files"].items()
            if not part or name.startswith(f"{part}/")}


def faults(folder: Path, part: str = "", *, hashes: bool = True) -> Iterator[str]:
    """Descriptions of the faults of a checkpoint folder; sizes first, because they are fast to check.

    Args:
        folder: The checkpoint folder.
        part: Check only this subfolder; empty checks all.
        hashes: Read and hash every file, which takes minutes for large models; False compares sizes alone.
    """
    try:
        files = _listed(folder, read(folder), part)
    except InputError as error:
        yield error.what
        return
    short = [file for file, (size, _) in files.items() if not file.is_file() or file.stat().st_size != size]
    for file in short:
        has = f"has {file.stat().st_size:,} bytes, not {files[file][0]:,}" if file.is_file() else "is missing"
        yield f"{file} {has}"
    if short or not hashes:
        return
    with ThreadPoolExecutor() as pool:
        for file, digest in zip(files, pool.map(sha256, files), strict=True):
            if digest != files[file][1]:
                yield f"{file} was changed since it was written"
    for file in sorted((folder / part).rglob("*.safetensors")) if part else ():
        if file not in files:
            yield f"{file} was added since the checkpoint was written"


def check_beside(folder: Path, where: str) -> None:
    """Refuse a folder of weights in a checkpoint (`adapter` or `model`) that differs from the manifest.

    A folder outside of checkpoints is accepted.

    Args:
        folder: Folder of the weights; also `adapter/first`.
        where: The key or option for it.

    Raises:
        InputError: The error names the file.
    """
    folder = folder.resolve()
    for checkpoint in (folder.parent, folder.parent.parent):
        if _is_checkpoint(checkpoint):
            for fault in faults(checkpoint, folder.relative_to(checkpoint).as_posix()):
                raise InputError(fault, where=where, fix=FIX)
            return


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a manifest, or is in a place where it should have one."""
    if folder.parent.name == "checkpoints" and folder.name.startswith("step_"):
        return True
    if not (folder / NAME).is_file():
        return False
    try:
        return bool(read(folder))
    except InputError:
        return False
