"""Find the strategy for a value of `trainer.strategy`; names of DeepSpeed select this project's `ZeroStrategy`."""

import importlib
import re
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lit_llm.errors import InputError, did_you_mean
from lit_llm.training.parallel import distribution

OWN = {                                             # first part of a name -> module of this package, class
    "deepspeed": ("zero", "ZeroStrategy"),
    "fsdp2": ("fsdp", "Fsdp2Strategy"),
}
PATHS = sorted(f"lit_llm.{name}" for _, name in OWN.values())


def strategy(value: Any) -> Any:
    """The strategy for a name or a parsed value; strategies and names of Lightning's are returned unchanged.

    Raises:
        InputError: There is no such strategy.
    """
    if isinstance(value, dict):                     # a value that could not be built
        raise InputError(f"{value.get('class_path')} is not a strategy that can be used here", where="trainer.strategy")
    if not isinstance(value, str):
        distribution.of(value)                      # refuses what cannot train correctly
        return value
    if own := OWN.get(value.partition("_")[0]):
        module, name = own
        return getattr(importlib.import_module(f"lit_llm.training.parallel.{module}"), name).from_name(value)
    if named := re.match(r"\{class_path: ([\w.]+)", value):
        near = [path for path in PATHS if path.endswith(f".{named[1].rpartition('.')[2]}")]
        raise InputError(f"there is no strategy '{named[1]}'" + (f". Did you mean '{near[0]}'?" if near else ""),
                         where="trainer.strategy", fix=f"this project's are {' and '.join(PATHS)}; Lightning's are in "
                         "lightning.pytorch.strategies")
    if value not in (names := ["auto", *OWN, *StrategyRegistry.available_strategies()]):
        raise InputError(f"no strategy is named '{value}'.{did_you_mean(value, names)}", where="trainer.strategy",
                         fix="auto, ddp, fsdp2 and deepspeed_stage_1, _2 and _3 are the usual ones")
    return value
