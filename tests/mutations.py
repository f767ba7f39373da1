"""Values that a config key may get by mistake or on purpose, and configs in which one leaf has such a value.

Used by `test_ranges.py`, which parses them, and `benchmarks/mutations.py`, which runs them.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
# As written in YAML.
VALUES: dict[str, str] = {
    "null": "null", "true": "true", "0": "0", "-1": "-1", "1": "1", "-0.5": "-0.5", "0.5": "0.5", "1e12": "1.0e+12",
    "1e308": "1.0e+308", "million_million": "1000000000000", "400_digits": "1" + "0" * 399, "nan": ".nan",
    "inf": ".inf", "-inf": "-.inf", "empty": '""', "x": "x", "1e3_text": '"1e3"', "[]": "[]", "[1]": "[1]",
    "[null]": "[null]", "{}": "{}", "{a}": "{a: 1}",
    "{1}": "{1: 1}", "deep": "[" * 60 + "]" * 60, "date": "2026-01-31", "long": '"' + "long " * 20_000 + '"',
    "unicode": '"\\u98CE\\u202E\\uFEFF\\U0001F642"', "nul": '"a\\0b"',
}
CONFIGS = sorted(path for folder in ("configs", "configs/with") for path in (ROOT / folder).glob("*.yaml"))
ZERO = "lit_llm.training.parallel.zero.ZeroStrategy"
CALLBACKS = ("StepCheckpoint", "Progress")


def value_of(name: str) -> Any:
    """A value of `VALUES`."""
    return yaml.safe_load(VALUES[name])


def leaves(config: Any, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of all leaves of a config, and of the mappings and lists between."""
    if above:
        yield above
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, part in parts:
        yield from leaves(part, (*above, key))


def with_value(config: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy of a config in which one place has another value; mappings and lists on the way are made."""
    out = copy.deepcopy(config)
    at: Any = out
    for key, following in itertools.pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        if isinstance(at, list):
            at += [{}] * (int(key) + 1 - len(at))  # type: ignore[arg-type]
            at[key] = at[key] or empty
        elif not isinstance(at.get(key), dict | list):
            at[key] = empty
        at = at[key]
    if isinstance(at, list) and int(path[-1]) >= len(at):
        at.append(value)
    else:
        at[path[-1]] = value
    return out


def merged(config: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys of another one over its own."""
    out = dict(config)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key in ("model", "data", "trainer")
        out[key] = merged(out[key], value) if both else value
    return out


def schema() -> dict[str, tuple[dict[str, Any], tuple[str | int, ...]]]:
    """Every key of `fit`, those of sources, adapters, callbacks and ZeRO too: what it needs beside it, and its path."""
    from lightning.pytorch.strategies import DeepSpeedStrategy

    from lit_llm.data.records.sources import Source
    from lit_llm.models.adapters.peft_method import LoRA
    from lit_llm.training.run import checkpoint
    from lit_llm.training.run import progress as callbacks
    from tests.test_class_paths import fit_parser

    keys: dict[str, tuple[dict[str, Any], tuple[str | int, ...]]] = {}
    for key in fit_parser().all_keys():
        if not key.endswith(".help") and key not in ("config", "ckpt_path", "weights_only"):
            keys[key] = {}, tuple(key.split("."))
    for field in fields(LoRA):
        keys[f"model.lora.{field.name}"] = {}, ("model", "lora", field.name)
    for field in fields(Source):
        keys[f"data.sources.{field.name}"] = {}, ("data", "sources", 0, field.name)
    for kind in (checkpoint.StepCheckpoint, callbacks.Progress):
        for name in inspect.signature(kind).parameters:
            spec = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": {}}
            keys[f"trainer.callbacks.{kind.__name__}.{name}"] = (
                {"trainer": {"callbacks": [spec]}}, ("trainer", "callbacks", 0, "init_args", name))
    for name in inspect.signature(DeepSpeedStrategy).parameters:
        keys[f"trainer.strategy.{name}"] = (
            {"trainer": {"strategy": {"class_path": ZERO, "init_args": {}}}}, ("trainer", "strategy", "init_args", name))
    for name in ("process_group_backend", "timeout"):
        keys[f"trainer.strategy.fsdp2.{name}"] = (
            {"trainer": {"strategy": {"class_path": "lit_llm.training.parallel.fsdp.Fsdp2Strategy", "init_args": {}}}},
            ("trainer", "strategy", "init_args", name))
    return keys
