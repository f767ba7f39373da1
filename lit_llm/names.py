"""Resolve the name of a model, tokenizer or corpus: a local path, a packaged sample, or a hub id."""

import os
from pathlib import Path

from lit_llm import hub
from lit_llm.errors import InputError, did_you_mean_path

SAMPLE = "sample:"                                  # a file or folder that ships with this package
SAMPLES = Path(__file__).resolve().parent / "samples"


def is_sample(name: str) -> bool:
    """Whether a name refers to a packaged file or folder."""
    return name.startswith(SAMPLE)


def resolve(name: str) -> str:
    """The name itself, or for `sample:NAME` the path of that file or folder in the installed package."""
    return str(SAMPLES / name.removeprefix(SAMPLE)) if is_sample(name) else name


def path_of(name: str) -> Path:
    """The local path of a name; for a hub id, a path that does not exist."""
    return Path(resolve(name)).expanduser()


def is_path(name: str) -> bool:
    """Whether a name can only be a local path: hub ids are `name` or `owner/name`.

    >>> [is_path(name) for name in ("gpt2", "Qwen/Qwen3-0.6B", "runs/sft/export", "./export", "~/export")]
    [False, False, True, True, True]
    """
    return Path(resolve(name)).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1


def check_folder(name: str, where: str, fix: str = "") -> None:
    """Refuse a model name that can only be a local path if the folder does not exist.

    Raises:
        InputError: Located at `where`, the key of the name.
    """
    if is_path(name) and not path_of(name).is_dir():
        near = did_you_mean_path(name, folders=True)
        raise InputError(f"there is no folder {name}{near and '.' + near}", where=where, fix=fix)


def check_available(name: str, where: str, fix: str = "") -> None:
    """Refuse a model name where there is no folder, and nothing can be downloaded or is in the hub's cache.

    Raises:
        InputError: Located at `where`, the key of the name.
    """
    check_folder(name, where, fix)
    if is_local_only(name) and not hub.has_files(name):
        raise hub.unreachable(name, where=where)


def folder_of(name: str) -> Path | None:
    """The folder of a model, local or in the hub's cache; null if there is none. Nothing is downloaded."""
    path = path_of(name)
    if path.is_dir():
        return path
    return hub.cached(name) if name.count("/") <= 1 and not path.is_absolute() else None


def is_local_only(name: str) -> bool:
    """Whether a model's files come from the hub's cache only, because the hub is not reachable."""
    return not path_of(name).is_dir() and hub.offline()


def absolute(path: str) -> str:
    """The absolute form of a local path; links are not resolved."""
    return os.path.abspath(os.path.expanduser(path))


def shown(path: str) -> str:
    """A path as a user would type it: `sample:NAME` for what ships with this package.

    >>> shown(resolve("sample:conversations.jsonl"))
    'sample:conversations.jsonl'
    """
    inside = path.removeprefix(f"{SAMPLES}{os.sep}")
    return path if inside == path else SAMPLE + inside
