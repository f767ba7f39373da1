"""Refuse options of the trainer or a strategy that have no effect in this project.

Lightning accepts these keys, so a user would rely on a setting that does nothing.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from lit_llm import rules
from lit_llm.errors import InputError
from lit_llm.rules import Rule

log = logging.getLogger(__name__)
IGNORED: dict[str, tuple[tuple[Any, ...], str]] = {     # key -> default values, reason why others have no effect
    "use_distributed_sampler": ((True, None), "the project's own loader divides the data over processes"),
    "sync_batchnorm": ((False, None), "language models have no batch normalisation"),
    "enable_autolog_hparams": ((True, None), "no hyperparameters are logged; the run's config.yaml has them"),
    "model_registry": ((None,), "it belongs to Lightning's platform, to which nothing is uploaded"),
    "limit_predict_batches": ((None,), "no verb predicts"),
}
ZERO = {                                            # arguments of DeepSpeedStrategy, and why they have no effect here
    "remote_device": "stage 3 places the weights by offload_parameters and offload_params_device",
    "load_full_weights": "checkpoints are always read in the format in which they were written",
    "exclude_frozen_parameters": "checkpoints never contain frozen weights",
    **dict.fromkeys(("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                     "synchronize_checkpoint_boundary"),
                    "activations are recomputed by torch, not by DeepSpeed; see model.gradient_checkpointing"),
}
SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
FEATURES: dict[str, Callable[[Mapping[str, object]], bool]] = {
    "`trainer.min_epochs`": lambda options: bool(options.get("min_epochs")),
    "`trainer.min_steps`": lambda options: bool(options.get("min_steps")),
    "no `trainer.callbacks` and no `trainer.max_time`":
        lambda options: not options.get("callbacks") and options.get("max_time") is None,
}
RULES = tuple(
    Rule(f"`trainer.{name}`", "no `trainer.callbacks` and no `trainer.max_time`", "nothing ends this run before "
         "trainer.max_epochs or max_steps, so a minimum has no effect", f"trainer.{name}",
         "leave it out, or add a callback such as EarlyStopping, or trainer.max_time")
    for name in ("min_epochs", "min_steps"))
ZERO_ELSEWHERE = (*SCALE, "config", "accelerator", "parallel_devices", "cluster_environment", "precision_plugin",
                  "process_group_backend", "timeout", "logging_level")      # not in DeepSpeed's config


def check_trainer(options: Mapping[str, object]) -> None:
    """Refuse options of Lightning's Trainer that have no effect here.

    Args:
        options: Options of the Trainer; missing keys are defaults.

    Raises:
        InputError: The error names the key.
    """
    for name, (defaults, why) in IGNORED.items():
        if name in options and options[name] not in defaults:
            raise InputError(f"{options[name]} has no effect: {why}", where=f"trainer.{name}",
                             fix="leave it out")
    rules.check(RULES, FEATURES, options)
    if isinstance(options.get("logger"), bool):
        log.warning("trainer.logger: %s has no effect: metrics.csv is always written; a logger set here is used in "
                    "addition", str(options["logger"]).lower())


def check_zero(arguments: Mapping[str, object], kind: type) -> None:
    """Refuse arguments of ZeroStrategy that have no effect.

    Args:
        arguments: All arguments by name, including defaults.
        kind: DeepSpeedStrategy, which builds a DeepSpeed config from them.

    Raises:
        InputError: The error names the argument.
    """
    parameters = inspect.signature(kind).parameters
    options = {name: value for name, value in arguments.items()
               if name not in parameters or value != parameters[name].default}
    for name, value in options.items():
        where = f"trainer.strategy.init_args.{name}"
        if name in ZERO:
            raise InputError(f"{value} has no effect: {ZERO[name]}", where=where, fix="leave it out")
        rest = {other: arguments for other, arguments in options.items() if other != name}
        if name not in ZERO_ELSEWHERE and kind(**options).config == kind(**rest).config:
            raise InputError(f"{value} has no effect with the other arguments of the strategy", where=where,
                             fix="leave it out, or set the option it belongs to as well (offload_optimizer, "
                             "offload_parameters); if `config` is given, set it there")
