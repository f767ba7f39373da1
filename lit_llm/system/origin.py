"""Identify the base model that something was trained on, and find its folder.

A base is identified by its content, not by its path: a relative path, an absolute path, a moved copy and the hub's
cache with the same bytes are the same base.
"""

import hashlib
import json
from pathlib import Path

from lit_llm import names
from lit_llm.errors import InputError

SAMPLE = 1 << 16                                    # bytes of a weight file that are hashed at three places


def content_hash(base: str | None) -> str | None:
    """sha256 of the config and of size, beginning, middle and end of the weight files; null if not local.

    Hashing a large model completely would take minutes, and training changes weights everywhere.
    """
    if base is None or (path := names.folder_of(base)) is None:
        return None
    digest = hashlib.sha256()
    for file in sorted([*path.glob("config.json"), *_weight_files(path)]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            for start in (0, size // 2, max(0, size - SAMPLE)):
                handle.seek(start)
                digest.update(handle.read(SAMPLE))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    """The weight files that transformers reads; a folder may also contain them in another format."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [file for name in listed if (file := path / str(name)).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass                                    # loading reports it
    single = path / "model.safetensors"
    return [single] if single.is_file() else list(path.glob("*.safetensors"))


def recorded(base: str | None) -> str | None:
    """A base's name for a checkpoint: the absolute path of a local folder, or the name (hub id, `sample:base`)."""
    if base is None or names.is_sample(base) or not names.path_of(base).is_dir():
        return base
    return names.absolute(base)


def same(one: str | None, one_hash: str | None, other: str | None, other_hash: str | None) -> bool:
    """Whether two bases are the same: by content if known, else by name."""
    return one_hash == other_hash if one_hash and other_hash else recorded(one) == recorded(other)


def locate(base: str, wanted: str | None, near: Path, replacement: str | None = None) -> str:
    """Find the base that a run was trained on.

    Args:
        base: Its name as recorded by the run.
        wanted: Hash of its content; null if unknown.
        near: A folder of the run; a moved base is searched beside its parent folders.
        replacement: The base that the user gives instead.

    Raises:
        InputError: `replacement` is a different base.
    """
    if replacement is not None:
        if not same(base, wanted, replacement, content_hash(replacement)):
            raise InputError(f"{replacement} is not the base that the run was trained on ({base})", where="base",
                             fix="give the current folder of that base")
        return replacement
    if names.folder_of(base) is not None or wanted is None or names.is_sample(base):
        return base
    parts = Path(base).parts
    for above in near.resolve().parents:
        for begin in range(len(parts)):
            place = above.joinpath(*parts[begin:]) if not Path(parts[begin]).is_absolute() else None
            if place is not None and place.is_dir() and content_hash(str(place)) == wanted:
                return str(place)
    return base
