"""Keep the answers of `proof.py` in memory and in the cache folder, so that each config is tried once.

A file that is damaged, belongs to another key or holds a value of the wrong kind is not used, and is written anew.
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

FORMAT = 2                                          # of answers on disk; raised whenever `proof.py` judges otherwise


@lru_cache(maxsize=64)
def in_memory(key: str) -> list[Way]:
    """Of a key: nothing yet, or the answer."""
    return []


def answered(facts: str, find: Callable[[], Way]) -> Way:
    """An answer given before for the same config by the same libraries, or a new one. A damaged file is no answer.

    Args:
        facts: The config as text; with the versions of the libraries it is the key of the answer.
        find: Computes the answer; called where none is kept.
    """
    import transformers

    key = hashlib.sha256(f"{FORMAT} {torch.__version__} {transformers.__version__} {facts}".encode()).hexdigest()
    known = in_memory(key)
    file = cache_root(None) / "proofs" / f"{key[:32]}.json"
    if not known:
        with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            known.append(_read(json.loads(file.read_text(encoding="utf-8")), key))
    if not known:
        known.append(find())
        with suppress(OSError):                     # a cache that cannot be written costs a second next time
            disk.replace_text(file, json.dumps({"key": key, "way": asdict(known[0])}) + "\n")
    return known[0]


def _read(entry: dict[str, Any], key: str) -> Way:
    """An entry whose every value is of the kind that was written.

    Raises:
        ValueError: It is not.
    """
    way = Way(**entry["way"])
    for name, value in asdict(Way()).items():
        kinds: tuple[type, ...] = (float, type(None)) if name == "cap" else (type(value),)
        if type(getattr(way, name)) not in kinds:
            raise ValueError(name)
    if entry["key"] != key or not math.isfinite(way.factor):
        raise ValueError("another key")
    return way
