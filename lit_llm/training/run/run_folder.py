"""The record that a run keeps of itself in its folder, and what later verbs may add to it.

`config.yaml` and `tokenizer/` say how it was trained; `data.json` what the sources held and what was drawn of each;
`metrics.json` has the figures of the checkpoint that it names, with those before training. Each `validate` and `test`
adds a line to `evaluations.jsonl`.
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
from lit_llm.system import lock
from lit_llm.system.private import lightning as private
from lit_llm.system.redaction import redact
from lit_llm.text.tokenizer import Tokenizer
from lit_llm.training.build import tokenizer_of
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.run import evaluation, manifest
from lit_llm.training.run.evaluation import figures_of
from lit_llm.training.run.report import MetricsCSV, write_json

log = logging.getLogger(__name__)


class RunFolder(Callback):
    """Keeps a run's own record, with the perplexity before training.

    An earlier run of the same name is moved aside, never overwritten.
    """

    def __init__(self, accept_changes: list[manifest.Change] | None = None) -> None:
        self.config: dict[str, Any] | None = None   # the CLI's
        self.accept_changes = accept_changes or []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.resumed_from: Path | None = None       # a checkpoint
        self.restarted = False                      # whether nobody asked for it: a job that was started again
        self._validated = -1                        # optimizer step of the last validation
        self._ending = self._started = self._made = False
        self.lock = lock.Lock()                     # of the folder, on rank 0
        self._aside: Path | None = None             # where the earlier run of this name is now

    @property
    def resumed(self) -> bool:
        """Whether this fit goes on from a checkpoint."""
        return self.resumed_from is not None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The checkpoint must be of this model and method: before anything is read from it; a new run needs a place."""
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
        """Be the only run that writes the folder, if it is there; rank 0 holds the lock for all. A collective.

        Raises:
            InputError: Another one writes it.
        """
        folder, refusal = Path(trainer.default_root_dir), None
        if trainer.is_global_zero and folder.is_dir():
            refusal = self.lock.take(folder / lock.NAME, "trainer.default_root_dir")
        if refusal := trainer.strategy.broadcast(refusal):
            end_together(trainer)
            raise refusal

    def state_dict(self) -> dict[str, Any]:
        """The figures before training, and the newest, survive a resume."""
        return {"before": dict(self.before), "after": dict(self.after), "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._validated = state_dict["validated"]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Now that the model stands, make room; then write the config, and the tokenizer with the template in use."""
        folder = Path(trainer.default_root_dir)
        self._claim(trainer)                        # it may have come into being since
        if trainer.is_global_zero:
            mine = self.lock.holds(folder / lock.NAME)
            if not self.resumed and mine and (aside := _set_aside(folder)) is not None:
                self._aside = aside
                (aside / lock.NAME).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
        self._claim(trainer)                        # the new one
        self._made = trainer.is_global_zero         # what is in it from here on is this run's
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

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A resumed run continues data and `metrics.csv` where its checkpoint stands.

        The loader was set up before the checkpoint was read, when the schedule asked for the length of an epoch, and
        Lightning does not come back to give it its state.
        """
        private.load_loader_state(trainer)     # refuses other data: nothing of the run is changed before
        self._started = True
        if self.resumed_from is not None:
            self._forget_other_data(trainer, self.resumed_from)
        if self.resumed and trainer.is_global_zero:
            self._write_config(trainer)
        if trainer.estimated_stepping_batches < trainer.log_every_n_steps:  # type: ignore[attr-defined]
            trainer.log_every_n_steps = 1  # type: ignore[attr-defined]     # or nothing of a short run would be known
        self._continue_rows(trainer)

    def _forget_other_data(self, trainer: L.Trainer, checkpoint: Path) -> None:
        """Figures of the validation data that the run had before are not compared with those of its new ones."""
        plan = getattr(trainer.datamodule, "plans", {}).get("val")  # type: ignore[attr-defined]
        then = manifest.read(checkpoint).get("data")
        apart = differences(then.get("val"), plan.fingerprint if plan else None) if isinstance(then, dict) else []
        if not apart:
            return
        self.before, self._validated = {}, -1
        if trainer.is_global_zero:
            log.warning("the validation data are others than before (%s): earlier checkpoints are not compared with "
                        "new ones, and perplexity before training is not known", "; ".join(apart))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A step's figures reach `metrics.csv` before any checkpoint of it is written; Lightning logs them later.

        Those of the last step, too, whatever its number.
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
        """The validation before the first step is the base's."""
        self.before = figures_of(trainer, "val/")
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.before:
                logger.add(self.before, 0)
        if trainer.is_global_zero and {"val/perplexity", "val/tokens"} <= self.before.keys():
            log.info("before training: validation perplexity %.3f on %d tokens",
                     self.before["val/perplexity"], self.before["val/tokens"])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the newest figures."""
        if self._ending:                            # before anyone saves
            private.move_logged_step(trainer, 1)
            self._ending = False
        if not trainer.sanity_checking:
            self._validated = trainer.global_step
            self._keep(trainer, "val")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A run that stops between two validations ends with one, or nobody would know what came out."""
        if trainer.enable_validation and self._validated != trainer.global_step:
            trainer.validating = self._ending = True
            private.move_logged_step(trainer, -1)      # logged at the last step, not at one behind it
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._keep_data(trainer)

    def check_left(self, trainer: L.Trainer) -> None:
        """Refuse to go on where no step is left, before anything of the run is written.

        A run that was stopped behind its last step still gets its last validation and its export. A job that was
        started again by itself ends well.

        Raises:
            InputError: With the limit that is reached.
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
        told = f"the checkpoint stands at step {step}, and {limit}"
        if step == total and (unfinished or self.restarted):
            if trainer.is_global_zero:
                log.info("nothing is left to train: %s", told)
            return
        end_together(trainer)
        raise InputError(f"there is nothing to train: {told}", where=limit.split()[0],
                         fix="raise it to train on; to measure or to write the model again, use validate or export")

    def complete(self, trainer: L.Trainer) -> None:
        """A run that was stopped behind its last step, in the validation that was to end it, is given that now."""
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
        """A run that failed before its first step leaves nothing behind, and the earlier run has its name again."""
        folder = Path(trainer.default_root_dir)
        self.lock.release()
        if trainer.global_step and self._started and trainer.state.fn == "fit" and folder.is_dir():
            with suppress(OSError):                 # a full disk: the error that brought us here is the one to tell
                self._keep_data(trainer)
        if self.resumed or trainer.global_step or not self._made or not folder.is_dir():
            return
        for name in ("config.yaml", "data.json", "metrics.csv", "metrics.json"):
            (folder / name).unlink(missing_ok=True)
        for name in ("tokenizer", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
        if not any(folder.iterdir()):
            folder.rmdir()
            if self._aside is not None:
                shutil.move(self._aside, folder)

    def on_test_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the newest figures."""
        self._keep(trainer, "test")

    def _keep_data(self, trainer: L.Trainer) -> None:
        """`data.json`: what the sources held, and what was drawn of each so far."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(data, "facts"):
            write_json(Path(trainer.default_root_dir) / "data.json", data.facts())

    def _keep(self, trainer: L.Trainer, split: str) -> None:
        if trainer.state.fn != "fit":
            self.after = evaluation.keep(trainer, split, self.config)
            return
        self.after = figures_of(trainer, f"{split}/")
        if trainer.is_global_zero:
            evaluation.write_metrics(Path(trainer.default_root_dir), trainer.global_step, self.after, self.before)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def _check_place(folder: Path) -> None:
    """An earlier run there would be moved aside, which must not be the very folder that somebody works in."""
    if _is_run(folder) and Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder.resolve()} holds an earlier run, and it is the current directory",
                         where="trainer.default_root_dir", fix="give a new folder, or go on with --ckpt_path last")


def _set_aside(folder: Path) -> Path | None:
    """Move an earlier run of this name to `<name>-1`, `-2`, ... The first free one; null if there was none."""
    if not _is_run(folder):
        return None
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    shutil.move(folder, aside)
    log.info("the earlier run in %s is now in %s", folder, aside)
    return aside
