"""A trainer's or a strategy's options in; an error for each that was set and can do nothing in this project.

Lightning accepts these keys and would ignore them here, so that a user would believe in a setting that has no effect.
"""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

from lit_llm.errors import InputError

log = logging.getLogger(__name__)
IGNORED: dict[str, tuple[tuple[Any, ...], str]] = {     # key -> values that are the default, why others do nothing
    "use_distributed_sampler": ((True, None), "rows are always divided over the processes by the project's own loader"),
    "sync_batchnorm": ((False, None), "language models have no batch normalisation"),
    "enable_autolog_hparams": ((True, None), "no hyperparameters are logged; config.yaml in the run folder holds them"),
    "model_registry": ((None,), "it names a place on Lightning's own platform, where nothing is uploaded"),
    "limit_predict_batches": ((None,), "no verb predicts"),
}
ZERO = {                                            # arguments of DeepSpeedStrategy, and why they do nothing here
    "remote_device": "stage 3 places the weights by offload_parameters and offload_params_device",
    "load_full_weights": "a checkpoint is always read in the format in which it was written",
    "exclude_frozen_parameters": "checkpoints never hold frozen weights",
    **dict.fromkeys(("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization",
                     "synchronize_checkpoint_boundary"),
                    "activations are recomputed by torch, not by DeepSpeed; see model.gradient_checkpointing"),
}
SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
ZERO_ELSEWHERE = (*SCALE, "config", "accelerator", "parallel_devices", "cluster_environment", "precision_plugin",
                  "process_group_backend", "timeout", "logging_level")      # not in the config that DeepSpeed is given


def check_trainer(options: Mapping[str, Any]) -> None:
    """Refuse options of Lightning's Trainer that change nothing here.

    Args:
        options: As given to the Trainer; keys that are not given are the default.

    Raises:
        InputError: It names the key.
    """
    for name, (defaults, why) in IGNORED.items():
        if name in options and options[name] not in defaults:
            raise InputError(f"{options[name]} would change nothing: {why}", where=f"trainer.{name}",
                             fix="leave it out")
    for name in ("min_epochs", "min_steps"):
        if options.get(name) and not options.get("callbacks") and options.get("max_time") is None:
            raise InputError("nothing ends this run before trainer.max_epochs or max_steps, so a minimum would change "
                             "nothing", where=f"trainer.{name}", fix="leave it out, or add a callback such as "
                             "EarlyStopping, or trainer.max_time")
    if isinstance(options.get("logger"), bool):
        log.warning("trainer.logger: %s changes nothing, metrics.csv is always written; a logger given here writes "
                    "elsewhere too", str(options["logger"]).lower())


def check_zero(given: Mapping[str, Any], kind: type) -> None:
    """Refuse arguments of ZeroStrategy that change nothing.

    Args:
        given: The arguments by name, also those that are the default.
        kind: DeepSpeedStrategy, which makes a DeepSpeed config of them.

    Raises:
        InputError: It names the argument.
    """
    known = inspect.signature(kind).parameters
    options = {name: value for name, value in given.items() if name not in known or value != known[name].default}
    for name, value in options.items():
        where = f"trainer.strategy.init_args.{name}"
        if name in ZERO:
            raise InputError(f"{value} would change nothing: {ZERO[name]}", where=where, fix="leave it out")
        rest = {other: given for other, given in options.items() if other != name}
        if name not in ZERO_ELSEWHERE and kind(**options).config == kind(**rest).config:
            raise InputError(f"{value} would change nothing beside the other arguments of the strategy", where=where,
                             fix="leave it out, or give what it belongs to as well (offload_optimizer, "
                             "offload_parameters); where `config` is given, set it there")


def check_scale(values: Mapping[str, Any], precision: str) -> None:
    """Refuse numbers of a loss scale that float16 alone has.

    Args:
        values: Attributes of a DeepSpeedStrategy by name.
        precision: Of the run.

    Raises:
        InputError: It names the argument.
    """
    for name, default in SCALE.items():
        if values[name] != default and not precision.startswith("16"):
            raise InputError(f"{precision} has no loss scale, so it would change nothing", fix="leave it out",
                             where=f"trainer.strategy.init_args.{name}")
