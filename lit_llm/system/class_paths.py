"""The classes that a config may name by `class_path`: nothing else is imported or built from YAML or a typed option.

A config may come from somebody else, and building an object runs its constructor. So a class_path is followed only
where the key's type says which base class it must have (`trainer.callbacks`, `logger`, `strategy`, `plugins`,
`profiler`), and only to the classes listed here. A class_path anywhere else, below `model.init` or
`model.peft.init_args` for instance, stays a mapping and is refused.

Who starts a command may open packages of their own with `--allow PACKAGE`. It is typed, and never read from a file or
from the environment. Classes of these packages may then be named at the same places, and as `model.class_path` and
`data.class_path`.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lit_llm.errors import InputError

# Public classes of Lightning by the package that exports them. Left out: LambdaCallback, whose arguments are functions;
# Timer, which no config can contain (trainer.max_time makes one); classes for unsupported hardware; the cloud's logger.
EXPORTS = {
    "lightning.pytorch.callbacks": (
        "DeviceStatsMonitor", "EMAWeightAveraging", "EarlyStopping", "GradientAccumulationScheduler",
        "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint", "RichModelSummary",
        "RichProgressBar", "SpikeDetection", "StochasticWeightAveraging", "TQDMProgressBar", "ThroughputMonitor",
        "WeightAveraging"),
    "lightning.pytorch.loggers": ("CSVLogger", "CometLogger", "MLFlowLogger", "TensorBoardLogger", "WandbLogger"),
    "lightning.pytorch.profilers": ("AdvancedProfiler", "PassThroughProfiler", "PyTorchProfiler", "SimpleProfiler"),
    "lightning.pytorch.strategies": ("DDPStrategy", "DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy",
                                     "SingleDeviceStrategy"),
    "lightning.pytorch.plugins": ("AsyncCheckpointIO", "DeepSpeedPrecision", "DoublePrecision", "FSDPPrecision",
                                  "HalfPrecision", "MixedPrecision", "Precision", "TorchCheckpointIO"),
    "lightning.fabric.plugins.environments": ("KubeflowEnvironment", "LSFEnvironment", "LightningEnvironment",
                                              "MPIEnvironment", "SLURMEnvironment", "TorchElasticEnvironment"),
    "torch.amp": ("GradScaler",),
    "lit_llm": ("FiniteGuard", "Fsdp2Strategy", "LoRA", "Progress", "Source", "StepCheckpoint", "ZeroStrategy"),
}
OWN = "lit_llm.training"                            # strategies, callbacks and loggers of this project
PLACES = "trainer.callbacks, logger, strategy, plugins and profiler"
OPTION = "--allow"
WHOLE = ("model", "data")                           # keys whose own class may be given, as `model.class_path`
# Packages that stay closed but for the classes above: some of their callables run programs.
CLOSED = {"lit_llm", "serve", "lightning", "pytorch_lightning", "torch", "jsonargparse", "transformers", "peft",
          "deepspeed", "datasets", "numpy", "pip", "setuptools", *sys.stdlib_module_names}
opened: list[str] = []                              # packages that were typed after --allow
_ever: set[str] = set()                             # by any command of this process


def allowed() -> list[str]:
    """Import paths that a config may name: each class where it is exported and where it is defined; opened packages."""
    paths = [OWN, *opened]
    for package, names in EXPORTS.items():
        module = import_module(package)
        for name in names:
            kind = getattr(module, name)
            paths += [f"{package}.{name}", f"{kind.__module__}.{kind.__qualname__}"]
    return sorted(set(paths))


def restrict(parsing: Any, paths: list[str]) -> None:
    """Restrict jsonargparse to these class paths, and never follow one for keys of any type.

    Args:
        parsing: The module `jsonargparse`.
        paths: What `allowed` gives; empty for verbs that build nothing.
    """
    covered = {package for package in _ever if is_open(package)}    # jsonargparse keeps what earlier commands opened
    parsing.set_parsing_settings(import_path_denylist=["*", *sorted(_ever - covered)],
                                 import_path_allowlist=[*paths, *(sorted(covered) if paths else ())],
                                 instantiate_subclass_spec_in_any=False)


def refuse_within(value: object, where: str) -> None:
    """Refuse a mapping or list that contains a class_path.

    Args:
        value: Value of a key that accepts numbers, texts, lists and mappings.
        where: The key.

    Raises:
        InputError: The error names the key and the class.
    """
    value = value.as_dict() if hasattr(value, "as_dict") else value     # jsonargparse's, of a class that is open
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        if key == "class_path":
            raise InputError(f"'{part}' is not allowed: no class_path is followed within this key", where=where,
                             fix=f"use numbers, texts, lists and mappings; classes are allowed in {PLACES}")
        refuse_within(part, f"{where}.{key}" if isinstance(value, dict) else where)


# ---- packages of the user --------------------------------------------------------------------------------------------

def open_typed(words: Sequence[str]) -> list[str]:
    """Open the packages of `--allow PACKAGE`, which may be given several times; the words without them.

    Args:
        words: As they were typed, behind the verb.

    Raises:
        InputError: There is no such package, or it is one that stays closed.
    """
    opened.clear()
    left, place = [], 0
    while place < len(words):
        name, equals, value = words[place].partition("=")
        if name == OPTION:
            place += 0 if equals else 1
            opened.append(_checked(value if equals else "".join(words[place:place + 1])))
        else:
            left.append(words[place])
        place += 1
    _ever.update(opened)
    return left


def _checked(package: str) -> str:
    """The name of a package that may be opened."""
    top = package.partition(".")[0]
    if not all(part.isidentifier() for part in package.split(".")):
        raise InputError(f"'{package[:80]}' is no name of a package", where=OPTION,
                         fix=f"for example {OPTION} my_package")
    if top in CLOSED:
        raise InputError(f"{top} stays closed, but for the classes that need no {OPTION}", where=OPTION,
                         fix=f"give the package in which your own classes are: {OPTION} my_package")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())                # as `python -m lit_llm` has it, for the command `lit-llm`
    if find_spec(top) is None:
        raise InputError(f"there is no package '{top}'", where=OPTION,
                         fix="install it, or start the command in the folder in which it is")
    return package


def is_open(path: str) -> bool:
    """Whether a class_path is in a package that was allowed."""
    return any(path == package or path.startswith(f"{package}.") for package in opened)


def how_to_open(path: str) -> str:
    """What to type so that a class_path is followed; empty where nothing opens it."""
    package, dot, _ = path.partition(".")
    return "" if package in CLOSED or not dot else f"if you know what is in {package}, type: {OPTION} {package}"


def subclass(path: str, base: type, where: str) -> Any:
    """The class that `model.class_path` or `data.class_path` names.

    Args:
        path: Of a class in an opened package, or the base itself.
        base: What it must inherit from.
        where: The key.

    Raises:
        InputError: It is in no opened package, cannot be imported, or is another kind of class.
    """
    if path in (f"lit_llm.{base.__name__}", f"{base.__module__}.{base.__name__}"):
        return base
    if not is_open(path):
        raise InputError(f"'{path[:200]}' is not allowed", where=where,
                         fix=how_to_open(path) or f"give a subclass of lit_llm.{base.__name__} in your own package")
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"'{path[:200]}' cannot be imported: {' '.join(str(error).split())[:200]}",
                         where=where) from None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise InputError(f"{path} is no subclass of lit_llm.{base.__name__}", where=where,
                         fix=f"class {name}(lit_llm.{base.__name__}): ...")
    return kind
