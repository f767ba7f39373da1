"""Which base model something was trained on: where it lies, and whether another folder holds the same one.

A base is known by its content, not by how its path is spelled: the same bytes by a relative path, by an absolute one,
as a moved copy, or in the hub's cache are one base.
"""

import hashlib
import json
from pathlib import Path

from lit_llm import names
from lit_llm.errors import InputError

SAMPLE = 1 << 16                                    # bytes of a weight file that are hashed, thrice


def content_hash(base: str | None) -> str | None:
    """sha256 over the config, and size, beginning, middle and end of the weight files; null where they are not here.

    Hashing a large model whole would take minutes. What training changes, it changes everywhere.
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
    """Those that transformers reads: a folder may hold the same weights in another layout, too."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            return [file for name in listed if (file := path / str(name)).is_file()]
        except (ValueError, KeyError, TypeError, AttributeError):
            pass                                    # loading it will say so
    single = path / "model.safetensors"
    return [single] if single.is_file() else list(path.glob("*.safetensors"))


def recorded(base: str | None) -> str | None:
    """A base's name as a checkpoint keeps it: absolute for a local folder, else as it is (a hub id, `sample:base`)."""
    if base is None or names.is_sample(base) or not names.path_of(base).is_dir():
        return base
    return names.absolute(base)


def same(one: str | None, one_hash: str | None, other: str | None, other_hash: str | None) -> bool:
    """Whether two bases are one: by content where both are known, else by name."""
    return one_hash == other_hash if one_hash and other_hash else recorded(one) == recorded(other)


def found(base: str, wanted: str | None, near: Path, given: str | None = None) -> str:
    """The base that a run was trained on.

    Args:
        base: Its name, as the run recorded it.
        wanted: Hash of its content; null where the run did not know it.
        near: A folder of the run. A base that lies no longer where it was is looked for beside the folders above.
        given: What the user names instead.

    Raises:
        InputError: `given` is another base.
    """
    if given is not None:
        if not same(base, wanted, given, content_hash(given)):
            raise InputError(f"{given} is another base than the run was trained on ({base})", where="base",
                             fix="give the folder of that base, wherever it lies now")
        return given
    if names.folder_of(base) is not None or wanted is None or names.is_sample(base):
        return base
    parts = Path(base).parts
    for above in near.resolve().parents:
        for begin in range(len(parts)):
            place = above.joinpath(*parts[begin:]) if not Path(parts[begin]).is_absolute() else None
            if place is not None and place.is_dir() and content_hash(str(place)) == wanted:
                return str(place)
    return base
