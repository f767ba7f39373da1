"""Tell of a callback whose `monitor` is the name of nothing that is logged.

A callback may monitor anything that the module or another callback logs, so a name can only be judged when a
validation has ended. Before the first step it is refused only where nothing but this project's module and Lightning's
own callbacks can log: then all names are known.
"""

import logging
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lit_llm.data.datamodule import TextDataModule
from lit_llm.errors import InputError, did_you_mean
from lit_llm.system.private import lightning as private
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.run.checkpoint import StepCheckpoint

log = logging.getLogger(__name__)
TRAINED = [f"train/{name}" for name in ("loss", "lr", "aux_loss", "grad_norm", "skipped_steps")]    # at some steps only
MEASURED = [f"val/{name}" for name in ("nll", "perplexity", "bits_per_byte", "token_accuracy", "tokens")]
BEST = "val/nll"                                    # the default of StepCheckpoint; other modules may not log it
COUNTED = ("epoch", "step")                         # of Lightning's ModelCheckpoint
OURS = ("lit_llm.", "lightning.")


def monitored(trainer: L.Trainer) -> Iterator[tuple[Any, str]]:
    """Callbacks of a run with the name that each monitors."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and name:
            yield callback, name


def check(trainer: L.Trainer) -> None:
    """Refuse a name before the first step, where it is certain that nothing logs it.

    Raises:
        InputError: It names what is logged.
    """
    from lit_llm.training.module import CausalLMModule

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    own = not all(type(callback).__module__.startswith(OURS) for callback in callbacks)
    if own or type(trainer.lightning_module) is not CausalLMModule:
        return
    data = trainer.datamodule  # type: ignore[attr-defined]
    measured = not isinstance(data, TextDataModule) or bool(data.val_dataloader())
    for callback, name in monitored(trainer):
        if name not in (*TRAINED, *MEASURED, *COUNTED) and not name.startswith("lr-"):     # LearningRateMonitor's
            raise _refusal(callback, name, [TRAINED[0], *MEASURED[:-1]])
        if name in MEASURED and isinstance(callback, EarlyStopping) and not measured:
            raise InputError(f"{name} is never measured: there is no validation data", where=_place(callback),
                             fix="set data.val_sources or data.val_fraction")


class MonitorCheck(Callback):
    """Looks at the end of the first validation whether what is monitored was logged; before other callbacks look.

    In the validation before the first step a warning is all, since callbacks may log nothing there.
    """

    def __init__(self) -> None:
        self._warned = self._checked = False

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before anything is written."""
        check(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Warn, or save a checkpoint and refuse.

        Raises:
            InputError: A callback needs now what was not logged.
        """
        if trainer.state.fn != "fit" or self._checked or (trainer.sanity_checking and self._warned):
            return
        logged = sorted(trainer.callback_metrics)
        missing = [(callback, name) for callback, name in monitored(trainer)
                   if name not in (*logged, *TRAINED, *COUNTED) and not name.startswith("lr-")
                   and not (isinstance(callback, StepCheckpoint) and name == BEST)]
        if not trainer.sanity_checking:
            self._checked = True
            for callback, name in missing:
                if _is_needed(callback, name, trainer):
                    self._save(trainer, module)
                    end_together(trainer)
                    raise _refusal(callback, name, logged, "the step is saved: go on with --ckpt_path last")
        if trainer.is_global_zero and not self._warned:
            for callback, name in missing:
                log.warning("%s: '%s' was not logged in this validation; there are %s.%s", _place(callback), name,
                            ", ".join(logged) or "no figures", did_you_mean(name, logged))
        self._warned = True

    @staticmethod
    def _save(trainer: L.Trainer, module: L.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepCheckpoint):
                callback.on_validation_end(trainer, module)


def _is_needed(callback: Any, name: str, trainer: L.Trainer) -> bool:
    """Whether a callback reads its figure at the end of a validation, and not later, when it may have been logged."""
    if name.startswith("train"):
        return False
    if isinstance(callback, EarlyStopping):
        return callback.strict and not private.looks_at_epoch_end(callback, trainer)
    if isinstance(callback, ModelCheckpoint):
        return not private.looks_at_epoch_end(callback, trainer)
    return isinstance(callback, StepCheckpoint)


def _refusal(callback: Any, name: str, logged: list[str], then: str = "") -> InputError:
    known = ", ".join(logged) or "no figures"
    return InputError(f"nothing is called '{name}'; there are {known}.{did_you_mean(name, logged)}",
                      where=_place(callback), fix=then)


def _place(callback: Any) -> str:
    return f"{type(callback).__name__}.monitor"
