"""The files that a run writes about itself in its folder, and what later verbs may add.

`config.yaml` and `tokenizer/` describe how it was trained; `data.json` the content of the sources and what was drawn of
each; `metrics.json` has the metrics of the checkpoint that it names and those before training. Each `validate` and
`test` adds a line to `evaluations.jsonl`. `training/record` adds `run.json` and the report.
"""

import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector.result import convert_tensors_to_scalars

from lit_llm.data.rows.identity import differences
from lit_llm.errors import InputError
from lit_llm.report import facts, writing
from lit_llm.system import lock
from lit_llm.system.private import lightning as private
from lit_llm.system.redaction import redact
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training.build import tokenizer_of
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.record import breakdowns
from lit_llm.training.run import evaluation, manifest
from lit_llm.training.run.evaluation import figures_of
from lit_llm.training.run.report import MetricsCSV, write_json

log = logging.getLogger(__name__)


class RunFolder(Callback):
    """Writes the files of a run, with the perplexity before training.

    An earlier run of the same name is moved aside, never overwritten.
    """

    def __init__(self, accept_changes: list[manifest.Change] | None = None) -> None:
        self.config: dict[str, Any] | None = None   # set by the CLI
        self.accept_changes = accept_changes or []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.resumed_from: Path | None = None       # a checkpoint
        self.restarted = False                      # whether a restarted job resumes by itself
        self._validated = -1                        # optimizer step of the last validation
        self._ending = self._started = self._made = False
        self.lock = lock.Lock()                     # lock on the folder, on rank 0
        self._aside: Path | None = None             # new path of an earlier run of the same name

    @property
    def resumed(self) -> bool:
        """Whether this fit resumes from a checkpoint."""
        return self.resumed_from is not None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that a checkpoint matches the model and method before it is read; check the folder of a new run."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.recording = stage == "fit"   # `metrics.csv` is the record of the fit
        checkpoint = self.resumed_from if stage == "fit" else getattr(pl_module, "checkpoint", None)
        if checkpoint is None and stage == "fit":
            _check_place(Path(trainer.default_root_dir))
        if stage == "fit":
            self._claim(trainer)
        if checkpoint is not None:
            try:
                manifest.check_same(checkpoint, trainer, self.accept_changes)
            except InputError:
                end_together(trainer)
                raise

    def _claim(self, trainer: L.Trainer) -> None:
        """Lock an existing folder against other runs; rank 0 holds the lock. Collective.

        Raises:
            InputError: Another run is writing to it.
        """
        folder, refusal = Path(trainer.default_root_dir), None
        if trainer.is_global_zero and folder.is_dir():
            refusal = self.lock.take(folder / lock.NAME, "trainer.default_root_dir")
        if refusal := trainer.strategy.broadcast(refusal):
            end_together(trainer)
            raise refusal

    def state_dict(self) -> dict[str, Any]:
        """The metrics before training and the newest ones."""
        return {"before": dict(self.before), "after": dict(self.after), "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics."""
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._validated = state_dict["validated"]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Once the model is built, move an earlier run aside, and write the config and the tokenizer."""
        folder = Path(trainer.default_root_dir)
        self._claim(trainer)                        # it may have been created since
        if trainer.is_global_zero:
            mine = self.lock.holds(folder / lock.NAME)
            if not self.resumed and mine and (aside := _set_aside(folder)) is not None:
                self._aside = aside
                (aside / lock.NAME).unlink(missing_ok=True)
                if (aside / facts.RUN).is_file():
                    writing.try_to_write(aside)     # its commands name the folder
            folder.mkdir(parents=True, exist_ok=True)
        self._claim(trainer)                        # the new one
        self._made = trainer.is_global_zero         # from here on its content belongs to this run
        if trainer.is_global_zero and not self.resumed:
            self._write_config(trainer)

    def _write_config(self, trainer: L.Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        if self.config is not None:
            text = yaml.safe_dump(redact(self.config), sort_keys=False, allow_unicode=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        tokenizer, base = tokenizer_of(trainer), getattr(trainer.lightning_module, "base", None)
        if tokenizer is None and base is not None and isinstance(trainer.lightning_module, SavedModule):
            with suppress(InputError):              # a base may have none
                tokenizer = Tokenizer.load(base)    # the ids of an own DataLoader are the base's
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        if plan := getattr(trainer.datamodule, "plans", {}).get("val"):  # type: ignore[attr-defined]
            evaluation.write_rows(folder, plan.corpus)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Continue data and `metrics.csv` of a resumed run at its checkpoint.

        The loader was set up before the checkpoint was read, because the schedule needs the length of an epoch, and
        Lightning does not restore its state afterwards.
        """
        private.load_loader_state(trainer)     # refuses other data: nothing of the run is changed before
        self._started = True
        if self.resumed_from is not None:
            self._forget_other_data(trainer, self.resumed_from)
        if self.resumed and trainer.is_global_zero:
            self._write_config(trainer)
        if trainer.estimated_stepping_batches < trainer.log_every_n_steps:  # type: ignore[attr-defined]
            trainer.log_every_n_steps = 1  # type: ignore[attr-defined]     # otherwise short runs would log nothing
        self._continue_rows(trainer)

    def _forget_other_data(self, trainer: L.Trainer, checkpoint: Path) -> None:
        """Drop metrics that were measured on other validation data."""
        plan = getattr(trainer.datamodule, "plans", {}).get("val")  # type: ignore[attr-defined]
        then = manifest.read(checkpoint).get("data")
        apart = differences(then.get("val"), plan.fingerprint if plan else None) if isinstance(then, dict) else []
        if not apart:
            return
        self.before = {name: value for name, value in self.before.items() if not name.startswith("val/")}
        self._validated = -1
        if trainer.is_global_zero:
            log.warning("the validation data have changed (%s): earlier checkpoints are not compared with new ones, "
                        "and perplexity before training is unknown", "; ".join(apart))

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Write a step's metrics to `metrics.csv` before any checkpoint of it; Lightning logs them later.

        The metrics of the last step are written as well, whatever its number.
        """
        if private.accumulates(trainer):
            return
        if private.logs_this_step(trainer) or trainer.global_step >= trainer.estimated_stepping_batches:
            figures = convert_tensors_to_scalars(private.logged_values(trainer)) | {"epoch": trainer.current_epoch}
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.log_metrics(figures, private.logged_step(trainer))

    def _continue_rows(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.resumed and trainer.is_global_zero:
                logger.resume(trainer.global_step)
        self._keep_data(trainer)

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Store the validation before the first step as that of the base."""
        self.before = figures_of(trainer, "val/")
        breakdowns.keep(trainer, "val")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.before:
                logger.add(self.before, 0)
        if trainer.is_global_zero and {"val/perplexity", "val/tokens"} <= self.before.keys():
            log.info("before training: validation perplexity %.3f on %d tokens",
                     self.before["val/perplexity"], self.before["val/tokens"])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Store the newest metrics."""
        if self._ending:                            # before anything is saved
            private.move_logged_step(trainer, 1)
            self._ending = False
        if not trainer.sanity_checking:
            self._validated = trainer.global_step
            self._keep(trainer, "val")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Validate at the end of a run that stopped between two validations."""
        if trainer.enable_validation and self._validated != trainer.global_step:
            trainer.validating = self._ending = True
            private.move_logged_step(trainer, -1)      # logged at the last step, not at one behind it
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._keep_data(trainer)

    def check_left(self, trainer: L.Trainer) -> None:
        """Refuse to resume where no step is left, before anything of the run is written.

        A run that was stopped after its last step still gets its last validation and its export. A job that restarted
        by itself ends without an error.

        Raises:
            InputError: The error names the limit that is reached.
        """
        if not self.resumed:
            return
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if step < total:
            return
        name = "max_epochs" if trainer.max_steps == -1 or step < trainer.max_steps else "max_steps"
        limit = f"trainer.{name} is {getattr(trainer, name)}"
        unmeasured = trainer.enable_validation and self._validated != step
        exporting = trainer.exports and trainer.checkpoint_callbacks  # type: ignore[attr-defined]
        unfinished = unmeasured or (exporting and not (Path(trainer.default_root_dir) / "export").is_dir())
        reason = f"the checkpoint is at step {step}, and {limit}"
        if step == total and (unfinished or self.restarted):
            if trainer.is_global_zero:
                log.info("nothing is left to train: %s", reason)
            return
        end_together(trainer)
        raise InputError(f"there is nothing to train: {reason}", where=limit.split()[0],
                         fix="raise it to train further; to evaluate or write the model again, use validate or export")

    def complete(self, trainer: L.Trainer) -> None:
        """Run the final validation of a run that was stopped after its last step."""
        if self._started or not self.resumed or not trainer.enable_validation:
            return
        if self._validated == trainer.global_step:
            return
        self._continue_rows(trainer)
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.restarting = False
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Remove a run that failed before its first step, and restore the name of an earlier run."""
        folder = Path(trainer.default_root_dir)
        self.lock.release()
        if trainer.global_step and self._started and trainer.state.fn == "fit" and folder.is_dir():
            with suppress(OSError):                 # the original error is the one to report
                self._keep_data(trainer)
        if self.resumed or trainer.global_step or not self._made or not folder.is_dir():
            return
        for name in ("config.yaml", "data.json", "metrics.csv", "metrics.json", evaluation.ROWS, facts.SAMPLES,
                     breakdowns.BREAKDOWNS, *writing.FILES):
            (folder / name).unlink(missing_ok=True)
        for name in ("tokenizer", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
            if self._aside is not None:
                shutil.move(self._aside, folder)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Store the newest metrics."""
        self._keep(trainer, "test")

    def _keep_data(self, trainer: L.Trainer) -> None:
        """Write `data.json`: the content of the sources, and what was drawn of each so far."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(data, "facts"):
            write_json(Path(trainer.default_root_dir) / "data.json", data.facts())

    def _keep(self, trainer: L.Trainer, split: str) -> None:
        if trainer.state.fn != "fit":
            self.after = evaluation.record(trainer, split, self.config)
            if trainer.is_global_zero and (Path(trainer.default_root_dir) / facts.RUN).is_file():
                writing.try_to_write(Path(trainer.default_root_dir))
            return
        self.after = figures_of(trainer, f"{split}/", "guard/")
        self._keep_data(trainer)
        breakdowns.keep(trainer, split)
        if trainer.is_global_zero:
            evaluation.write_metrics(Path(trainer.default_root_dir), trainer.global_step, self.after, self.before)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def _check_place(folder: Path) -> None:
    """Refuse a run folder with an earlier run that is the current directory, because it would be moved."""
    if _is_run(folder) and Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder.resolve()} contains an earlier run and is the current directory",
                         where="trainer.default_root_dir", fix="give a new folder, or resume with --ckpt_path last")


def _set_aside(folder: Path) -> Path | None:
    """Move an earlier run of this name to the first free name of `<name>-1`, `-2`, ...; null if there was none."""
    if not _is_run(folder):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    shutil.move(folder, aside)
    log.info("the earlier run in %s was moved to %s", folder, aside)
    return aside
