"""Check that the metrics that callbacks monitor are logged.

A callback may monitor any metric that the module or another callback logs, so a missing one is certain only after a
validation. Before the first step a name is refused only if the module and all callbacks are this project's or
Lightning's, whose metrics are known.
"""

import logging
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from lit_llm.data.datamodule import TextDataModule
from lit_llm.errors import InputError, did_you_mean
from lit_llm.report.rows import MEMORY, SPEED
from lit_llm.system.private import lightning as private
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.run.checkpoint import StepCheckpoint

log = logging.getLogger(__name__)
TRAINED = [*(f"train/{name}" for name in ("loss", "lr", "aux_loss", "grad_norm", "skipped_steps")), SPEED, MEMORY]
MEASURED = [f"val/{name}" for name in ("nll", "perplexity", "bits_per_byte", "bits_per_character", "token_accuracy",
                                       "nll_low", "nll_high", "documents", "tokens")]
UNLISTED = ("val/nll_low", "val/nll_high", "val/documents", "val/tokens")       # of which a message would be long
BEST = "val/nll"                                    # the default of StepCheckpoint; other modules may not log it
COUNTED = ("epoch", "step")                         # Lightning's ModelCheckpoint monitors them as well
KNOWN_PACKAGES = ("lit_llm.", "lightning.")


def monitored(trainer: L.Trainer) -> Iterator[tuple[Any, str]]:
    """Pairs of a callback of the run and the metric that it monitors."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = getattr(callback, "monitor", None)
        if isinstance(name, str) and name:
            yield callback, name


def check(trainer: L.Trainer) -> None:
    """Refuse the name of a metric before the first step if nothing can log it.

    Raises:
        InputError: The error lists the metrics that are logged.
    """
    from lit_llm.training.module import CausalLMModule

    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    own = not all(type(callback).__module__.startswith(KNOWN_PACKAGES) for callback in callbacks)
    if own or type(trainer.lightning_module) is not CausalLMModule:
        return
    data = trainer.datamodule  # type: ignore[attr-defined]
    measured = not isinstance(data, TextDataModule) or bool(data.val_dataloader())
    known = [*MEASURED, *(_of_sources(data) if isinstance(data, TextDataModule) else ())]
    for callback, name in monitored(trainer):
        guarded = name.startswith("guard/") and getattr(data, "guard_sources", None)
        if name not in (*TRAINED, *known, *COUNTED) and not (guarded or name.startswith("lr-")):     # of a callback
            raise _refusal(callback, name, [TRAINED[0], *(metric for metric in known if metric not in UNLISTED)])
        if name in known and isinstance(callback, EarlyStopping) and not measured:
            raise InputError(f"{name} is never measured: there is no validation data", where=_place(callback),
                             fix="set data.val_sources or data.val_fraction")


def _of_sources(data: TextDataModule) -> list[str]:
    """Metrics of each source of the validation data, if there are several."""
    names = getattr(data.val_dataloader(), "sources", ())
    return [f"val/nll/{name}" for name in names] if len(names) > 1 else []


class MonitorCheck(Callback):
    """Checks after the first validation that the monitored metrics were logged, before other callbacks need them.

    After the validation before the first step it only warns, because callbacks may log nothing there.
    """

    def __init__(self) -> None:
        self._warned = self._checked = False

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Check the names before anything is written."""
        check(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Warn of a missing metric; if a callback needs it now, save a checkpoint and stop.

        Raises:
            InputError: A callback needs a metric that was not logged.
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
                    raise _refusal(callback, name, logged, "set the callback's monitor to one of them and resume with "
                                   "--ckpt_path last; this step is saved")
        if trainer.is_global_zero and not self._warned:
            for callback, name in missing:
                log.warning("%s: the metric '%s' was not logged in this validation; logged are %s.%s", _place(callback),
                            name, ", ".join(logged) or "no metrics", did_you_mean(name, logged))
        self._warned = True

    @staticmethod
    def _save(trainer: L.Trainer, module: L.LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepCheckpoint):
                callback.on_validation_end(trainer, module)


def _is_needed(callback: object, name: str, trainer: L.Trainer) -> bool:
    """Whether a callback reads its metric at the end of a validation, not later, when it may have been logged."""
    if name.startswith("train"):
        return False
    if isinstance(callback, EarlyStopping):
        return callback.strict and not private.looks_at_epoch_end(callback, trainer)
    if isinstance(callback, ModelCheckpoint):
        return not private.looks_at_epoch_end(callback, trainer)
    return isinstance(callback, StepCheckpoint)


def _refusal(callback: object, name: str, logged: list[str], then: str = "") -> InputError:
    names = ", ".join(logged) or "no metrics"
    return InputError(f"no metric '{name}' is logged; logged are {names}.{did_you_mean(name, logged)}",
                      where=_place(callback), fix=then)


def _place(callback: object) -> str:
    return f"{type(callback).__name__}.monitor"
