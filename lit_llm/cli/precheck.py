"""Refuse unknown keys and missing files before torch is imported, which takes seconds.

`keys.json` holds the keys that the verbs of a run take; `runs.py` derives them from the signatures, and a test compares
the two. What is decided here is decided by the parser as well: anything that is not certainly wrong is left to it.
"""

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lit_llm.cli import parser
from lit_llm.data.records import sources
from lit_llm.errors import InputError

FILE = Path(__file__).with_name("keys.json")
SOURCES = ("data.sources", "data.val_sources", "data.test_sources")


@cache
def known() -> list[str]:
    """Keys of all verbs of a run."""
    return list(json.loads(FILE.read_text(encoding="utf-8")))


def check(options: Sequence[str]) -> None:
    """Refuse keys that no verb of a run takes, config files that do not exist, and sources without a file.

    Args:
        options: Words behind the verb.

    Raises:
        InputError: As the parser and the data module would say it.
    """
    if any(word in ("-h", "--help") or word.partition("=")[0].endswith(".help") for word in options):
        return
    paths: dict[str, Any] = {}
    for key, value in _given(options):
        key = key.removesuffix("+")
        if re.fullmatch(r"[\w.]+", key) and not _is_key(key):
            raise InputError(parser.unknown(key, "", known()))
        if key in SOURCES:
            paths[key] = value
        elif key.startswith(SOURCES):
            return                                  # a part of a source that is given elsewhere
    for value in paths.values():
        for item in value if isinstance(value, list) else ():
            path = item.get("path") if isinstance(item, dict) else None
            if isinstance(path, str) and path and not sources.is_hub(path) and not glob.has_magic(path):
                sources.check_exists(path)


def _is_key(key: str) -> bool:
    """Whether it is a key, lies below one that takes a mapping, or holds others; the parser's own are not judged."""
    names = known()
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
    return (key in names or key.startswith(("print_", "trust-checkpoint"))
            or any(key.startswith(f"{leaf}.") for leaf in leaves))


def _given(options: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys with their values in the order in which they win: of each config file, and typed."""
    words = list(options)
    for at, word in enumerate(words):
        name, equals, text = word.partition("=")
        value = text if equals else words[at + 1] if at + 1 < len(words) else ""
        if name in ("-c", "--config"):
            yield from _written(value)
        elif name.startswith("--") and name != "--":
            yield name[2:], _read(value) if name[2:] in SOURCES else value


def _written(file: str) -> Iterator[tuple[str, Any]]:
    """Keys of a config file."""
    if not Path(file).expanduser().exists() and not file.lstrip().startswith(("{", "[")):
        raise InputError(parser.explain(f"File does not exist: '{Path(file).expanduser().absolute()}'", known()))
    content = _read(Path(file).read_text(encoding="utf-8")) if Path(file).is_file() else None
    yield from _flat(content, "")


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Keys of a mapping, down to those that take values."""
    for name, part in value.items() if isinstance(value, Mapping) else ():
        key = f"{prefix}{name}"
        holds = any(other.startswith(f"{key}.") for other in known())
        if isinstance(part, Mapping) and part and (holds or not _is_key(key)):
            yield from _flat(part, f"{key}.")
        else:
            yield key, part


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None                                 # the parser says so
