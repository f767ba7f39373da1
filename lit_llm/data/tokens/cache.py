"""The cache of token stores: the folder for a source, a tokenizer and settings, and the lock on it.

The folder of a store is named by a hash of everything that determines its content. Beside it is a lock file, held by
the single process that writes the store; it records why the last writer failed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lit_llm import disk
from lit_llm.data.records import formats
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.store import TokenStore
from lit_llm.disk import cache_root
from lit_llm.errors import InputError
from lit_llm.system.private import others
from lit_llm.text.tokenizer import Tokenizer

LARGE = 64 << 20                                        # bytes above which the hash of a file is cached
RULES = 1                                               # increase it when the same data give other tokens or masks
SETTLED = 2.0                                           # seconds; a file that is newer may change within a clock tick


# ---- the key ---------------------------------------------------------------------------------------------------------

def folder_of(source: Source, tokenizer: Tokenizer, settings: dict[str, Any], cache_dir: str | None) -> Path:
    """The folder of a source's tokens, which depends on data, tokenizer, template, settings and `RULES`.

    Raises:
        InputError: A file of the source cannot be read.
    """
    root = cache_root(cache_dir)
    read = {key: value for key, value in asdict(source).items() if key != "weight"}
    if source.is_hub:
        data = [[source.path, others.fingerprint(source.hub_dataset())]]
    else:
        data = [[str(path), _digest(path, root / "digests")] for path in source.files()]
    own = formats.version(source.format)
    parts = [read, data, tokenizer.fingerprint, settings, RULES, *([own] if own else [])]
    return root / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _digest(path: Path, memory: Path) -> str:
    """sha256 of a file; for large files it is cached until the file's metadata change."""
    try:
        with path.open("rb") as stream:
            seen = os.fstat(stream.fileno())
            name = str(path.absolute())
            identity = [name, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino]
            note = memory / hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
            if seen.st_size >= LARGE and (cached_digest := _remembered(note, identity)):
                return cached_digest
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if seen.st_size >= LARGE and time.time() - max(seen.st_mtime, seen.st_ctime) > SETTLED:
        with contextlib.suppress(OSError):              # a read-only cache
            disk.replace_text(note, json.dumps([identity, digest]))
    return digest


def _remembered(note: Path, identity: list[Any]) -> str | None:
    try:
        cached_identity, digest = json.loads(note.read_text(encoding="utf-8"))
        return str(digest) if cached_identity == identity else None
    except (OSError, ValueError, TypeError):
        return None


# ---- reading ---------------------------------------------------------------------------------------------------------

def opened(folder: Path, *, say: bool = False) -> TokenStore | None:
    """Open a store if it exists and is intact.

    Args:
        folder: Its folder, which appeared by a rename and is complete unless it was changed later.
        say: Whether to report damage on stderr.
    """
    if not folder.exists():
        return None
    try:
        return TokenStore(folder)
    except InputError as error:
        if say:
            print(f"the token store {folder} is damaged ({error.what}) and will be rebuilt", file=sys.stderr)
        return None


def waited_for(folder: Path, patience: float) -> TokenStore:
    """Wait for a store that another process writes, by polling the disk while that process is working.

    Raises:
        InputError: The other process failed, or no process has been working for `patience` seconds.
    """
    began, lock = time.time(), folder.with_suffix(".lock")
    idle = time.monotonic()
    while not (store := opened(folder)):
        failure = _failure(lock)
        if _is_held(lock):
            idle = time.monotonic()
        elif failure and (lock.stat().st_mtime >= began or time.monotonic() - idle > patience):
            raise failure
        elif time.monotonic() - idle > patience:
            raise InputError(f"the tokens of this source do not exist, and no process has been preparing them for "
                             f"{patience:.0f} seconds", where=str(folder.parent),
                             fix="Did another process stop? Run `python -m "
                             "lit_llm prepare` first, on each machine that does not share data.cache_dir.")
        time.sleep(0.25)
    return store


def size_of(root: Path) -> tuple[int, int]:
    """Number of stores in a cache, and their bytes."""
    stores = [meta.parent for meta in root.glob("*/meta.json")]
    return len(stores), sum(file.stat().st_size for store in stores for file in store.iterdir())


# ---- writing ---------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Wait for the lock on a store. Removes leftovers of interrupted writers; a failure is recorded in the lock file.

    Raises:
        InputError: The cache cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock")
        with _locked(lock):
            with lock.open("r+", encoding="utf-8") as note:
                note.truncate(0)
            _sweep(folder)
            try:
                yield
            except (InputError, OSError) as error:
                refusal = error if isinstance(error, InputError) else _unwritable(error, folder.parent)
                with contextlib.suppress(OSError), lock.open("r+", encoding="utf-8") as note:
                    note.write(json.dumps([refusal.what, refusal.where, refusal.fix]))
                raise refusal from None
    except OSError as error:
        raise _unwritable(error, folder.parent) from None


def _unwritable(error: OSError, root: Path) -> InputError:
    return InputError(f"the token cache cannot be written: {error}", where=str(root),
                      fix="Free some space, or set data.cache_dir (or LIT_LLM_CACHE) to another folder.")


def _locked(path: Path, *, wait: bool = True) -> AbstractContextManager[object]:
    """A lock of one process, which the system releases when that process ends in any way.

    Raises:
        OSError: The file cannot be locked; without `wait`, another process holds the lock.
    """
    return FileLock(path).acquire(timeout=-1 if wait else 0)


def _sweep(mine: Path) -> None:
    """Remove incomplete stores of writers that no longer run; the caller holds its own lock.

    Stores whose lock is held, or that belong to another user, are kept.
    """
    for debris in mine.parent.glob("*.tmp-*"):
        owner = mine.parent / debris.name.split(".")[0]
        with contextlib.suppress(OSError), \
                contextlib.nullcontext() if owner == mine else _locked(owner.with_suffix(".lock"), wait=False):
            shutil.rmtree(debris, ignore_errors=True)


def _is_held(lock: Path) -> bool:
    try:
        if lock.exists():
            with _locked(lock, wait=False):
                return False
    except Timeout:
        return True
    except OSError:
        return False
    return False


def _failure(lock: Path) -> InputError | None:
    """The recorded error of the last writer."""
    try:
        what, where, fix = json.loads(lock.read_text(encoding="utf-8"))
        return InputError(what, where=where, fix=fix)
    except (OSError, ValueError):
        return None
