"""Identify the data of a run, in named parts: which records, and which settings pack them.

Records are identified by their content, so a file may be moved or renamed and still be the same data.
"""

from hashlib import sha256
from pathlib import Path
from typing import Any

from lit_llm.data.tokens.store import TokenStore

COLUMNS = ("length", "supervised", "kind", "ended", "content")      # columns of a store's table, without places


def of_store(store: TokenStore, name: str) -> dict[str, Any]:
    """The records of one source.

    Args:
        store: The store with its sequences.
        name: Path of the source; its last part is kept for messages and never compared.
    """
    digest = sha256()
    for column in COLUMNS:
        digest.update(store.sequences[column].tobytes())
    return {"name": Path(name).name or name, "sequences": len(store), "content": digest.hexdigest()[:16]}


def differences(before: object, now: object) -> list[str]:
    """Describe how two identities differ, by the names of the keys; empty if they are equal.

    >>> differences({"data.seq_len": 64}, {"data.seq_len": 128})
    ['data.seq_len was 64 and is 128']
    """
    if isinstance(now, dict) and not isinstance(before, dict):
        return ["data was recorded by another version of lit_llm and cannot be compared"]
    if not isinstance(before, dict) or not isinstance(now, dict):
        return [] if before == now else [f"data was {before} and is {now}"]
    changes = []
    for key, value in now.items():
        then = before.get(key)
        if key == "data.sources":
            changes += _sources(then or [], value)
        elif key == "tokenizer":
            changes += ["the tokenizer or its chat template has changed"] if then != value else []
        elif then != value:
            changes.append(f"{key} was {then} and is {value}")
    return changes


def _sources(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    if len(before) != len(now):
        return [f"data.sources was {len(before)} sources and is {len(now)}"]
    return [f"data.sources[{number}] was {then['sequences']:,} sequences ({then['name']}) and is "
            f"{one['sequences']:,} ({one['name']}), with other records"
            for number, (then, one) in enumerate(zip(before, now, strict=True))
            if (then["content"], then["sequences"]) != (one["content"], one["sequences"])]
