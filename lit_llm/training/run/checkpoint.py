"""Write checkpoint folders during a fit; a folder is complete or does not exist.

    runs/sft/checkpoints/
      step_40/   state           Lightning's or DeepSpeed's: optimizer, schedule, loops, generators, place in the data
      step_40/   state           of Lightning or DeepSpeed: optimizer, schedule, loops, random states, position in data
                 adapter/        or model/: the trained weights in standard formats (safetensors)
                 manifest.json   sizes and hashes of all files; written last, then the folder gets its final name
      LATEST     name of the newest folder; BEST is that of the folder with the best monitored metric

`manifest.py` defines which folders are checkpoints.
"""

import logging
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from lit_llm import disk
from lit_llm.data.rows.identity import differences
from lit_llm.errors import InputError
from lit_llm.models import load as model
from lit_llm.models.adapters import adapter, starting
from lit_llm.system import origin, ranges
from lit_llm.system.private import lightning as private
from lit_llm.training.checks import divergence, in_memory
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.parallel.shards import elements_of, gathered_trainable_state
from lit_llm.training.run import manifest
from lit_llm.training.run.evaluation import figures_of
from lit_llm.training.run.manifest import step_of
from lit_llm.training.run.report import MetricsCSV
from lit_llm.training.run.writing import Writing

log = logging.getLogger(__name__)
PREFIX = "model."                                   # attribute of the LightningModule with the model
GIB = 2**30


class StepCheckpoint(Checkpoint):
    """Saves after optimizer steps, after each validation and at the end; keeps the newest, the best and milestones.

    Args:
        every_n_steps: Save every n optimizer steps; null saves at validations and at the end only. A run that is
            killed loses at most this many steps.
        monitor: Metric that decides which checkpoint is best; `val/nll` is perplexity on a log scale.
        mode: Whether lower (`min`) or higher (`max`) values are better.
        keep_best: Number of best checkpoints kept on disk.
        keep_last: Number of newest checkpoints kept on disk.
        keep_every_n_steps: Also save every n steps and never delete these checkpoints; null disables this.
    """

    def __init__(self, every_n_steps: int | None = None, monitor: str = "val/nll", mode: Literal["min", "max"] = "min",
                 keep_best: int = 1, keep_last: int = 1, keep_every_n_steps: int | None = None) -> None:
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.keep_best, self.keep_last, self.keep_every_n_steps = keep_best, keep_last, keep_every_n_steps
        self.scores: dict[str, float] = {}          # folder name -> monitored value
        self._saved = -1
        self._reference_scores = in_memory.ReferenceScores()    # reference sequences that each checkpoint is scored on
        self._unfinished = False                    # whether the checkpoint is written within a validation

    # ---- when to save ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write states directly to their file; Lightning would make a second copy in memory and then in /tmp.

        Raises:
            InputError: A number is too small; checked here because jsonargparse hides reasons of constructors.
        """
        ranges.check_all("StepCheckpoint", vars(self))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = _StateFile()

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        """Read the scores of existing checkpoints; folders after the step that is resumed from are set aside."""
        step = trainer.global_step
        _check_disk(trainer, copies=1 if step else 2)
        if step and trainer.is_global_zero:
            plans = getattr(trainer.datamodule, "plans", {})  # type: ignore[attr-defined]
            self._recall(checkpoints(trainer), step, plans["val"].fingerprint if "val" in plans else None)
        if self._unfinished:                        # Lightning would treat the validation as done
            private.restart_validation(trainer)
            self._unfinished = False
        epochs: Any = trainer.fit_loop.epoch_progress.total
        if trainer.fit_loop.restarted_mid_epoch and epochs.processed == epochs.started:
            # The checkpoint was written after an epoch's last batch, and Lightning has counted that epoch as done; it
            # would still continue as within an epoch: neither call `on_train_epoch_start` for the next epoch nor count
            # it as started. A second resume would then count one epoch too few.
            trainer.fit_loop.reset_restart_stage()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save every n steps and at the last step of an epoch and of the run; if a validation is due, after it.

        Never within an accumulation window, whose gradients a file would lose, and not only in `on_train_end`, where
        Lightning's counters already belong to the next epoch and a resumed run would mix two windows.
        """
        if private.accumulates(trainer):
            return
        step = trainer.global_step
        due = any(every and step % every == 0 for every in (self.every_n_steps, self.keep_every_n_steps))
        if (due or trainer.is_last_batch or step == trainer.max_steps) and not validation_is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save after a validation within fit, with its score."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not private.accumulates(trainer):
            score = trainer.callback_metrics.get(self.monitor)
            named = {} if score is None else {self.monitor: float(score)}
            self.save(trainer, named.get(self.monitor), figures_of(trainer, "val/", "guard/") | named)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save at the end, unless the last step is already on disk."""
        self.save(trainer)

    # ---- what is saved -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The step at which it was saved."""
        return {"step": self._saved, "unfinished": self._unfinished}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The loaded step is already on disk."""
        self._saved, self._unfinished = state_dict["step"], state_dict["unfinished"]

    def save(self, trainer: L.Trainer, score: float | None = None, figures: dict[str, float] | None = None, *,
             unfinished: bool = False) -> None:
        """Write the checkpoint of this step. Collective: all ranks call it.

        Args:
            trainer: The trainer within a fit.
            score: The monitored metric at this step; null if it was not measured.
            figures: All metrics of this step.
            unfinished: Whether it is written within a validation, which a resumed run repeats.

        Raises:
            InputError: The checkpoint cannot be written; older checkpoints are intact.
        """
        step = trainer.global_step
        folder = checkpoints(trainer) / f"step_{step}"
        if score is not None and math.isfinite(score):              # a NaN is never best
            self.scores[folder.name] = score
        if step == self._saved or not step:
            if figures and trainer.is_global_zero and (folder / manifest.NAME).is_file():
                manifest.set_score(folder, score, figures)          # it was saved before the validation
                self._point_and_prune(folder)
            return
        divergence.check_weights(trainer)
        self._saved, self._unfinished = step, unfinished
        partial = folder.with_name(folder.name + ".partial")
        writing = Writing(trainer, partial)
        with writing.noted():
            if trainer.is_global_zero:
                writing.begin()
        writing.agree(f"the checkpoint of step {step}")
        with writing.noted(), writing.deferred():
            trainer.save_checkpoint(partial / "state")
        writing.agree(f"the checkpoint of step {step}")
        scored = self._reference_scores.measured(trainer)
        state = gathered_trainable_state(trainer.lightning_module)
        with writing.noted():
            if trainer.is_global_zero:
                assert state is not None
                writing.release()
                if isinstance(trainer.lightning_module, SavedModule):    # of another module, the state is all
                    self._write_weights(trainer, partial, state)
                manifest.write(partial, trainer, score, figures, scored)
                for logger in trainer.loggers:
                    if isinstance(logger, MetricsCSV):
                        logger.sync()               # rows must be on disk before the checkpoint that follows them
                disk.replace_folder(partial, folder)
                self._point_and_prune(folder)
        writing.agree(f"the checkpoint of step {step}")
        self._unfinished = False

    def _recall(self, folders: Path, step: int, measured_on: object) -> None:
        for half in folders.glob("*.partial"):
            shutil.rmtree(half, ignore_errors=True)
        for folder in manifest.folders(folders.parent):
            if step_of(folder.name) > step:
                aside = folder.with_name(f"abandoned_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                log.info("%s is after step %d, from which this run resumes; it was moved to %s", folder, step, aside)
            elif not (folder / manifest.NAME).is_file():
                shutil.rmtree(folder, ignore_errors=True)           # deletion was interrupted when the run was killed
            elif (score := self._score_of(folder, measured_on)) is not None:
                self.scores[folder.name] = float(score)
        if (folders / f"step_{step}").is_dir():
            self._point_and_prune(folders / f"step_{step}")

    def _score_of(self, folder: Path, measured_on: object) -> float | None:
        """The monitored metric of an earlier checkpoint; null if it was measured on other data."""
        facts = manifest.read(folder)
        data = facts.get("data")
        if isinstance(data, dict) and differences(data.get("val"), measured_on):
            return None
        score: float | None = (facts.get("figures") or {}).get(self.monitor)
        return score if facts.get("figures") else facts["score"]

    @staticmethod
    def _write_weights(trainer: L.Trainer, folder: Path, state: dict[str, Any]) -> None:
        module: Any = trainer.lightning_module
        state = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
        if adapter.is_peft(module.model):
            adapter.save_adapter(module.model, folder / "adapter", state, base=str(origin.recorded(module.base)))
            if module.start is not None and module.merge_start:
                starting.copy_merged_adapter(Path(module.start), folder / "adapter")
        else:
            model.save_weights(module.model, folder / "model", state)
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if stop_ids := getattr(tokenizer, "stop_ids", ()):          # stop tokens beside the trained weights
            settings = model.generation_config(module.model, stop_ids, tokenizer.pad_id)
            settings.save_pretrained(folder / ("adapter" if adapter.is_peft(module.model) else "model"))

    def _point_and_prune(self, newest: Path) -> None:
        disk.replace_text(newest.parent / "LATEST", newest.name + "\n")
        here = {path.name for path in manifest.folders(newest.parent.parent)}
        ranked = sorted((name for name in self.scores if name in here), key=lambda name: (
            self.scores[name] if self.mode == "min" else -self.scores[name], step_of(name)))
        if ranked:
            disk.replace_text(newest.parent / "BEST", ranked[0] + "\n")
        keep = {*ranked[: self.keep_best], *sorted(here, key=step_of)[-self.keep_last:]}
        if self.keep_every_n_steps:
            keep |= {name for name in here if step_of(name) % self.keep_every_n_steps == 0}
        for name in here - keep:
            (newest.parent / name / manifest.NAME).unlink(missing_ok=True)  # first: it defines a checkpoint
            shutil.rmtree(newest.parent / name, ignore_errors=True)


class _StateFile(TorchCheckpointIO):
    """Writes one file in place; its folder is either complete or absent."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)    # for Lightning's own callbacks
        torch.save(checkpoint, path)


def checkpoints(trainer: L.Trainer) -> Path:
    """The folder of a run's checkpoints."""
    return Path(trainer.default_root_dir) / "checkpoints"


def validation_is_due(trainer: L.Trainer) -> bool:
    """Whether Lightning validates after this training batch; called at the end of the batch."""
    epoch = trainer.fit_loop.epoch_loop
    if not private.validates_now(trainer):
        return False
    epoch.val_loop.setup_data()                     # otherwise it does not know yet whether there are batches
    return not epoch.val_loop.skip


def estimated_bytes(module: L.LightningModule) -> int:
    """Estimated bytes of one checkpoint, from the trained weights."""
    strategy = distribution.of(module.trainer.strategy)
    return (1 << 20) + sum(strategy.checkpoint_bytes(elements_of(weight), weight.element_size())
                           for weight in module.parameters() if weight.requires_grad)


def _check_disk(trainer: L.Trainer, copies: int) -> None:
    """Before the first step, check the free space for all checkpoints; rank 0 broadcasts the result.

    Raises:
        InputError: There is too little space.
    """
    folder = checkpoints(trainer)
    while not folder.is_dir():
        folder = folder.parent
    need, free = copies * estimated_bytes(trainer.lightning_module), shutil.disk_usage(folder).free
    need, free = trainer.strategy.broadcast((need, free))
    if free < need:
        end_together(trainer)
        raise InputError(f"{copies} checkpoints take about {need / GIB:.2f} GiB but only {free / GIB:.2f} GiB are free",
                         where=str(folder), fix="free some space, or write elsewhere: --trainer.default_root_dir")
