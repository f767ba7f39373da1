"""Cache the results of `proof.py` in memory and on disk, so that each config is tried once.

A file that is damaged, belongs to another key or has a value of the wrong type is ignored and rewritten.
"""

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch

from lit_llm import disk
from lit_llm.disk import cache_root
from lit_llm.training.forward import Way

FORMAT = 2  # version of cached results; increase it when results of `proof.py` change


@lru_cache(maxsize=64)
def in_memory(key: str) -> list[Way]:
    """The result for a key: an empty list, or one item."""
    return []


def cached(facts: str, find: Callable[[], Way]) -> Way:
    """A cached result for the same config and libraries, or a new one. Damaged files are ignored.

    Args:
        facts: The config as text; the key is made of it and the versions of the libraries.
        find: Computes the result; called if none is cached.
    """
    import transformers

    key = hashlib.sha256(f"{FORMAT} {torch.__version__} {transformers.__version__} {facts}".encode()).hexdigest()
    results = in_memory(key)
    file = cache_root(None) / "proofs" / f"{key[:32]}.json"
    if not results:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            results.append(_read(json.loads(file.read_text(encoding="utf-8")), key))
    if not results:
        results.append(find())
        with suppress(OSError):                     # without a cache it is computed again next time
            disk.replace_text(file, json.dumps({"key": key, "way": asdict(results[0])}) + "\n")
    return results[0]


def _read(entry: dict[str, Any], key: str) -> Way:
    """Read an entry, and check the types of its values.

    Raises:
        ValueError: A value has another type.
    """
    way = Way(**entry["way"])
    for name, value in asdict(Way()).items():
        kinds: tuple[type, ...] = (float, type(None)) if name == "cap" else (type(value),)
        if type(getattr(way, name)) not in kinds:
            raise ValueError(name)
    if entry["key"] != key or not math.isfinite(way.factor):
        raise ValueError("another key")
    return way
