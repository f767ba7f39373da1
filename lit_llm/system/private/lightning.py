"""Private names of Lightning."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Methods that subclasses here override or call: class -> names.
OF_BASE_CLASSES = {
    "lightning.pytorch.Trainer": ("_run", "_run_stage"),
    "lightning.pytorch.strategies.DeepSpeedStrategy": (
        "_config_initialized", "_format_config", "_init_config_if_needed", "_init_deepspeed_distributed",
        "_precision_plugin"),
    "lightning.pytorch.strategies.ModelParallelStrategy": ("_data_parallel_size",),
}
_WATCHER = "child-process-observer"                 # name of its thread


def accumulates(trainer: Any) -> bool:
    """Whether the micro-batch at hand is not the last one of its optimizer step."""
    return bool(trainer.fit_loop._should_accumulate())


def logs_this_step(trainer: Any) -> bool:
    """Whether the step at hand is one of those that `log_every_n_steps` selects."""
    return bool(trainer._logger_connector.should_update_logs)


def logged_values(trainer: Any) -> dict[str, Any]:
    """What was logged for loggers in the step at hand."""
    return dict(trainer._logger_connector.metrics["log"])


def logged_step(trainer: Any) -> int:
    """The step at which loggers write what is logged now."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def move_logged_step(trainer: Any, by: int) -> None:
    """Let loggers write at another step."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += by


def validates_now(trainer: Any) -> bool:
    """Whether a validation follows this training batch, if there are validation data; asked at the batch's end."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def restart_validation(trainer: Any) -> None:
    """Let a resumed run begin the validation again inside of which it was stopped."""
    from lightning.pytorch.loops.evaluation_loop import RestartStage

    validation = trainer.fit_loop.epoch_loop.val_loop
    validation.restarting, validation._restart_stage = False, RestartStage.RESTARTED_MID_EVALUATION


def load_loader_state(trainer: Any) -> None:
    """Give the train loader its state of the checkpoint that is resumed."""
    trainer.fit_loop._load_combined_loader_states()


def leave_signals_alone(trainer: Any) -> None:
    """Keep Lightning from handling signals and from asking all ranks about them after each batch."""
    def nothing(*_: object) -> None:
        pass

    trainer._signal_connector.register_signal_handlers = nothing
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = nothing


def looks_at_epoch_end(callback: Any, trainer: Any) -> bool:
    """Whether EarlyStopping or ModelCheckpoint reads its metric at the end of training epochs, not of validations."""
    if hasattr(callback, "_should_save_on_train_epoch_end"):
        return bool(callback._should_save_on_train_epoch_end(trainer))
    return bool(callback._check_on_train_epoch_end)


def trainer_of(module: Any) -> Any:
    """The trainer that a module is attached to, or None, where `module.trainer` raises."""
    return module._trainer


def call_as_step(strategy: Any, module: Any, method: str, *args: Any) -> Any:
    """Call a method of a module inside the forward pass of its wrapper (DDP, DeepSpeed), as for `training_step`."""
    return strategy._forward_redirection(strategy.model, module, method, *args)


@contextmanager
def modes_restored(model: Any) -> Iterator[None]:
    """After this context every layer is in training or evaluation mode as before."""
    from lightning.pytorch.utilities.model_helpers import _ModuleMode

    mode = _ModuleMode()
    mode.capture(model)
    try:
        yield
    finally:
        mode.restore(model)


def starts_processes(launcher: object) -> bool:
    """Whether a launcher starts the command once for each further process of its machine."""
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    return isinstance(launcher, _SubprocessScriptLauncher)


def spawns(launcher: object) -> bool:
    """Whether a launcher starts processes as new interpreters that import the script, instead of the command."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    return isinstance(launcher, _MultiProcessingLauncher) and launcher._start_method in ("spawn", "forkserver")


def dismiss_watcher() -> None:
    """Stop the thread that would end this process without a message when one that it started has ended."""
    for thread in threading.enumerate():
        if thread.name == _WATCHER:
            thread._run = lambda: True  # type: ignore[attr-defined]


def change_wandb_arguments(logger: Any, change: Callable[[Any], Any]) -> None:
    """Replace what a WandbLogger will hand to wandb."""
    logger._wandb_init = change(logger._wandb_init)
