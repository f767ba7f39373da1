"""Private names of DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def has_master(weight: object) -> bool:
    """Whether an optimizer of ZeRO 1 or 2 keeps a float32 copy of a weight."""
    return hasattr(weight, "_hp_mapping")


def is_stepped(weight: object) -> bool:
    """Whether an optimizer of ZeRO-3 owns a weight."""
    return hasattr(weight, "_z3_optimizer")


@contextmanager
def loads_universal(engine: Any) -> Iterator[None]:
    """Within, an engine reads a universal checkpoint, which any number of processes can load."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def recovery_script(engine: object) -> tuple[Any, str]:
    """(object, name of its method) by which the first process copies a script into a checkpoint."""
    return engine, "_copy_recovery_script"
