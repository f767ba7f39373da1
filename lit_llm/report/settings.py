"""The settings of a run that differ from their defaults."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

PARTS = ("seed_everything", "model", "data", "trainer")


@cache
def defaults() -> dict[str, Any]:
    """The default of each key of a run config, also below `model.lora` and in the items of `data.sources`."""
    table = json.loads(files("lit_llm").joinpath("cli/keys.json").read_text(encoding="utf-8"))
    return {key: entry["default"] for key, entry in (table["nested"] | table["keys"]).items()}


def differences(config: dict[str, Any]) -> list[dict[str, Any]]:
    """For each key that differs from its default: `key`, `value` and `default`; a default of no key of ours is null.

    Args:
        config: The content of a run's `config.yaml`, in which every key is given.
    """
    default_values = defaults()
    return [{"key": key, "value": _changed(key, value), "default": default_values.get(key)}
            for key, value in flat(config) if value != default_values.get(key)]


def _changed(key: str, value: Any) -> Any:
    """A value whose parts are keys, such as a source, without those parts that have their defaults."""
    if isinstance(value, list):
        return [_changed(key, item) for item in value]
    if not isinstance(value, dict):
        return value
    key = "data.sources" if key.endswith("_sources") else key       # whose items have the same keys
    return {name: item for name, item in value.items()
            if f"{key}.{name}" not in defaults() or item != defaults()[f"{key}.{name}"]}


def flat(config: dict[str, Any]) -> list[tuple[str, Any]]:
    """The keys of a run config, such as `model.lr`, with their values."""
    entries: list[tuple[str, Any]] = []
    for part in PARTS:
        value = config.get(part)
        if isinstance(value, dict):
            entries += [(f"{part}.{name}", item) for name, item in value.items()]
        elif part in config:
            entries.append((part, value))
    return entries
