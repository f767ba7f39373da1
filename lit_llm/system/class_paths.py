"""The classes that a config may name by `class_path`: nothing else is imported or built from YAML or a typed option.

A config may come from somebody else, and building an object runs its constructor. So a class_path is followed only
where the key's type says which base class it must have (`trainer.callbacks`, `logger`, `strategy`, `plugins`,
`profiler`), and only to the classes listed here. A class_path anywhere else, below `model.init` or
`model.peft.init_args` for instance, stays a mapping and is refused.
"""

from typing import Any

from lit_llm.errors import InputError

# Public classes of Lightning by the package that exports them. Left out: LambdaCallback, whose arguments are functions;
# Timer, which no config can hold (trainer.max_time makes one); classes for unsupported hardware; the cloud's logger.
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


def allowed() -> list[str]:
    """Import paths that a config may name: each class where it is exported, and where it is defined."""
    from importlib import import_module

    paths = [OWN]
    for package, names in EXPORTS.items():
        module = import_module(package)
        for name in names:
            kind = getattr(module, name)
            paths += [f"{package}.{name}", f"{kind.__module__}.{kind.__qualname__}"]
    return sorted(set(paths))


def restrict(parsing: Any, paths: list[str]) -> None:
    """Tell jsonargparse to follow a class_path to these import paths only, and never where a key takes any value.

    Args:
        parsing: The module `jsonargparse`.
        paths: What `allowed` gives; empty for verbs that build nothing.
    """
    parsing.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=paths,
                                 instantiate_subclass_spec_in_any=False)


def refuse_within(value: Any, where: str) -> None:
    """Refuse a mapping or list that names a class anywhere inside.

    Args:
        value: What a config gives for a key that takes numbers, texts, lists and mappings.
        where: The key.

    Raises:
        InputError: It names the key and the class.
    """
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        if key == "class_path":
            raise InputError(f"'{part}' is not built here: no class_path is followed below this key", where=where,
                             fix=f"give numbers, texts, lists and mappings; classes are named in {PLACES}")
        refuse_within(part, f"{where}.{key}" if isinstance(value, dict) else where)
