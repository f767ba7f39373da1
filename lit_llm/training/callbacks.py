"""What is worth watching and keeping while a model learns; none of it is needed for correctness.

`Progress` shows the run, `RunFolder` keeps what it was and what came out.
"""

import logging
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar

from lit_llm.errors import InputError, did_you_mean
from lit_llm.training import manifest
from lit_llm.training.processes import end_together
from lit_llm.training.report import MetricsCSV, redact, write_json

log = logging.getLogger(__name__)
REFRESH = 0.2                                       # seconds between two looks of a bar


class Progress(ProgressBar):
    """One bar for the whole run: steps, loss, validation perplexity, tokens/s, time left.

    Where stderr is no terminal, a plain line every `every_seconds` instead.

    Args:
        every_seconds: Between two plain lines.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._bar: Any = None
        self._enabled = True
        self._tokens, self._since, self._said = 0, 0.0, 0.0
        self._first = self._seen = 0                # optimizer steps

    def disable(self) -> None:
        """On ranks that should be silent."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Open the bar at the step where the run stands."""
        self._tokens, self._since = 0, time.monotonic()
        self._said, self._first, self._seen = self._since, trainer.global_step, trainer.global_step
        if self._enabled and trainer.is_global_zero:
            self._bar = _bar(int(trainer.estimated_stepping_batches), trainer.global_step, "train")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        """Count tokens; move at step ends."""
        self._tokens += int(batch["num_tokens"]) * trainer.world_size
        moved, self._seen = trainer.global_step - self._seen, trainer.global_step
        if self._bar is None or not moved:
            return
        now = time.monotonic()
        self._bar.update(moved)
        if now - self._said < (self.every_seconds if self._bar.disable else REFRESH):   # figures wait for the device
            return
        self._said = now
        shown = self._figures(trainer) | {"tok/s": f"{self._tokens / max(1e-9, now - self._since):,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        if self._bar.disable:
            total = int(trainer.estimated_stepping_batches)
            left = (now - self._since) / (self._seen - self._first) * (total - self._seen)
            facts = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self._seen}/{total}: {facts}, {left:.0f} s left", file=sys.stderr, flush=True)

    @staticmethod
    def _figures(trainer: L.Trainer) -> dict[str, str]:
        known = trainer.callback_metrics
        keys = {"loss": ("train/loss", ".3f"), "val ppl": ("val/perplexity", ".3f"),
                "skipped": ("train/skipped_steps", ".0f")}
        return {name: format(float(known[key]), form) for name, (key, form) in keys.items() if key in known}

    def on_train_end(self, *_: Any) -> None:
        """Close it."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Close it, so that the error stands on a line of its own."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A bar of its own for a long validation outside fit."""
        if self._enabled and trainer.is_global_zero and trainer.state.fn != "fit":
            self._bar = _bar(sum(int(count) for count in trainer.num_val_batches), 0, "validate", unit="batch")

    on_test_start = on_validation_start  # type: ignore[assignment]

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Move it."""
        if self._bar is not None and trainer.state.fn != "fit":
            self._bar.update(1)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Close it."""
        if trainer.state.fn != "fit":
            self._close()

    on_test_end = on_validation_end  # type: ignore[assignment]


def _bar(total: int, initial: int, name: str, unit: str = "step") -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc=name, unit=unit, dynamic_ncols=True, file=sys.stderr,
                disable=not sys.stderr.isatty(), mininterval=REFRESH)


class RunFolder(Callback):
    """Keeps a run's own record: `config.yaml`, `tokenizer/`, `data.json`, `metrics.json`, perplexity before training.

    An earlier run of the same name is moved aside, never overwritten.
    """

    def __init__(self, accept_changes: list[manifest.Change] | None = None) -> None:
        self.config: dict[str, Any] | None = None   # the CLI's
        self.accept_changes = accept_changes or []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.resumed_from: Path | None = None       # a checkpoint
        self._validated = -1                        # optimizer step of the last validation
        self._ending = self._started = self._made = False
        self._aside: Path | None = None             # where the earlier run of this name is now

    @property
    def resumed(self) -> bool:
        """Whether this fit goes on from a checkpoint."""
        return self.resumed_from is not None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The checkpoint must be of this model and method: before anything is read from it; a new run needs a place."""
        if self.resumed_from is None and stage == "fit":
            _check_place(Path(trainer.default_root_dir))
        if self.resumed_from is not None and stage == "fit":
            try:
                manifest.check_same(self.resumed_from, trainer, self.accept_changes)
            except InputError:
                end_together(trainer)
                raise

    def state_dict(self) -> dict[str, Any]:
        """The figures before training, and the newest, survive a resume."""
        return {"before": dict(self.before), "after": dict(self.after), "validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.before, self.after = dict(state_dict["before"]), dict(state_dict["after"])
        self._validated = state_dict["validated"]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Now that the model stands, make room; then write the config, and the tokenizer with the template in use."""
        _check_monitors(trainer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if not self.resumed:
            self._aside = _set_aside(folder)
        self._made = True                           # what is in it from here on is this run's
        folder.mkdir(parents=True, exist_ok=True)
        if self.config is not None:
            text = yaml.safe_dump(redact(self.config), sort_keys=False, allow_unicode=True)
            (folder / "config.yaml").write_text(text, encoding="utf-8")
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A resumed run continues data and `metrics.csv` where its checkpoint stands.

        The loader was set up before the checkpoint was read, when the schedule asked for the length of an epoch, and
        Lightning does not come back to give it its state.
        """
        self._started = True
        trainer.fit_loop._load_combined_loader_states()
        self._continue_rows(trainer)

    def _continue_rows(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV) and self.resumed and trainer.is_global_zero:
                logger.resume(trainer.global_step)
        self._keep_data(trainer)

    def on_sanity_check_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The validation before the first step is the base's."""
        self.before = _figures(trainer, "val/")
        if trainer.is_global_zero and self.before:
            log.info("before training: validation perplexity %.3f on %d tokens",
                     self.before["val/perplexity"], self.before["val/tokens"])

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the newest figures."""
        if self._ending:                            # before anyone saves
            trainer.fit_loop.epoch_loop._batches_that_stepped += 1
            self._ending = False
        if not trainer.sanity_checking:
            self._validated = trainer.global_step
            self._keep(trainer, "val/")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """A run that stops between two validations ends with one, or nobody would know what came out."""
        if trainer.enable_validation and self._validated != trainer.global_step:
            trainer.validating = self._ending = True
            trainer.fit_loop.epoch_loop._batches_that_stepped -= 1      # logged at the last step, not at one behind it
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
        self._keep_data(trainer)

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
        if trainer.global_step and trainer.state.fn == "fit":
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
        self._keep(trainer, "test/")

    def _keep_data(self, trainer: L.Trainer) -> None:
        """`data.json`: what the sources held, and what was drawn of each so far."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(data, "facts"):
            write_json(Path(trainer.default_root_dir) / "data.json", data.facts())

    def _keep(self, trainer: L.Trainer, split: str) -> None:
        self.after = _figures(trainer, split)
        if trainer.is_global_zero:
            facts: dict[str, Any] = {"step": trainer.global_step} | self.after
            if self.before:
                facts |= {f"before/{name}": value for name, value in self.before.items()}
            write_json(Path(trainer.default_root_dir) / "metrics.json", facts)


def _figures(trainer: L.Trainer, prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}


def _check_monitors(trainer: L.Trainer) -> None:
    """A misspelled metric would otherwise stop the run at its first validation."""
    known = ["train/loss", *(f"val/{name}" for name in ("nll", "perplexity", "bits_per_byte", "token_accuracy"))]
    bare = {name.partition("/")[2] for name in known}
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    measured = data is None or bool(data.val_dataloader())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = str(getattr(callback, "monitor", None) or "")
        where = f"{type(callback).__name__}.monitor"
        if (name.startswith(("val", "train")) or name in bare) and name not in known:
            raise InputError(f"nothing is called '{name}'; there are {', '.join(known)}.{did_you_mean(name, known)}",
                             where=where)
        if name.startswith("val/") and isinstance(callback, EarlyStopping) and not measured:
            raise InputError(f"{name} is never measured: there is no validation data", where=where,
                             fix="set data.val_sources or data.val_fraction")


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or (folder / "checkpoints").exists()


def _check_place(folder: Path) -> None:
    """An earlier run there would be moved aside, which must not be the very folder that somebody works in."""
    if _is_run(folder) and Path.cwd().is_relative_to(folder.resolve()):
        raise InputError(f"{folder.resolve()} holds an earlier run, and you stand in it",
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
