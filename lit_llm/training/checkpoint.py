"""A running fit in, checkpoint folders out: complete or not there.

    runs/sft/checkpoints/
      step_40/   state           Lightning's or DeepSpeed's: optimizer, schedule, loops, position in the data
                 adapter/        or model/: the trained weights in the field's formats (safetensors)
                 manifest.json   sizes and hashes of all of it; written last, then the folder gets its name
      LATEST     the newest folder's name; BEST the one with the best monitored metric

Knows nothing of losses or data. A folder without a valid manifest does not exist.
"""

import hashlib
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_llm import adapter, disk, model
from lit_llm.errors import InputError
from lit_llm.training.strategy import gathered_trainable_state

log = logging.getLogger(__name__)
PREFIX = "model."                                   # the LightningModule's name for what it trains


class StepCheckpoint(Checkpoint):
    """Saves at optimizer-step ends, after each validation and at the end; keeps the newest and the best.

    Args:
        every_n_steps: Save every so many optimizer steps; null saves at validations and at the end only.
        monitor: Metric that decides which checkpoint is best; `val/nll` is perplexity on a log scale.
        mode: Whether small or large values of it are good.
        keep_best: Best checkpoints kept on disk.
        keep_last: Newest checkpoints kept on disk.
    """

    def __init__(self, every_n_steps: int | None = None, monitor: str = "val/nll", mode: Literal["min", "max"] = "min",
                 keep_best: int = 1, keep_last: int = 1) -> None:
        self.every_n_steps, self.monitor, self.mode = every_n_steps, monitor, mode
        self.keep_best, self.keep_last = keep_best, max(1, keep_last)
        self.scores: dict[str, float] = {}          # folder name -> monitored value
        self._saved = -1

    # ---- when --------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A resumed run compares with what lies there; folders behind the step where it goes on are set aside."""
        self._saved = step = trainer.global_step
        if step and trainer.is_global_zero:
            self._recall(checkpoints(trainer), step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Every n optimizer steps, at an epoch's last and at the run's last.

        Never inside an accumulation window, whose gradients a file would lose; and not only in `on_train_end`, where
        Lightning's counters already stand in the next epoch and a resumed run would mix two windows.
        """
        step = trainer.global_step
        due = bool(self.every_n_steps and step % self.every_n_steps == 0)
        if (due or trainer.is_last_batch or step == trainer.max_steps) and not trainer.fit_loop._should_accumulate():
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a validation inside fit, with its score."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fit_loop._should_accumulate():
            score = trainer.callback_metrics.get(self.monitor)
            self.save(trainer, None if score is None else float(score))

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        """At the end, unless the last step is on disk already."""
        self.save(trainer)

    # ---- what --------------------------------------------------------------------------------------------------------

    def save(self, trainer: L.Trainer, score: float | None = None) -> None:
        """Write the folder of this step; a collective of all ranks.

        Args:
            trainer: In a fit.
            score: The monitored metric at this very step; null if it was not measured here.
        """
        step = trainer.global_step
        folder = checkpoints(trainer) / f"step_{step}"
        if score is not None and math.isfinite(score):              # a NaN is never best
            self.scores[folder.name] = score
        if step == self._saved or not step:
            if score is not None and trainer.is_global_zero and (folder / "manifest.json").is_file():
                _write_score(folder / "manifest.json", score)       # saved before it was measured
                self._point_and_prune(folder)
            return
        self._saved = step
        partial = folder.with_name(folder.name + ".partial")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial / "state")
        state = gathered_trainable_state(trainer.lightning_module)
        if trainer.is_global_zero:
            assert state is not None
            self._write_weights(trainer, partial, state)
            _write_manifest(trainer, partial, score)
            disk.replace_folder(partial, folder)
            self._point_and_prune(folder)
        trainer.strategy.barrier()

    def _recall(self, folders: Path, step: int) -> None:
        for folder in sorted(folders.glob("step_*"), key=lambda path: _step(path.name)):
            if _step(folder.name) > step:
                aside = folder.with_name(f"abandoned_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                log.info("%s lies behind step %d, where this run goes on; it is now in %s", folder, step, aside)
            elif (folder / "manifest.json").is_file():
                score = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["score"]
                if score is not None:
                    self.scores[folder.name] = float(score)
        if (folders / f"step_{step}").is_dir():
            self._point_and_prune(folders / f"step_{step}")

    @staticmethod
    def _write_weights(trainer: L.Trainer, folder: Path, state: dict[str, Any]) -> None:
        module: Any = trainer.lightning_module
        state = {name.removeprefix(PREFIX): weight for name, weight in state.items()}
        if adapter.is_peft(module.model):
            adapter.save_adapter(module.model, folder / "adapter", state, base=str(module.base))
        else:
            model.save_weights(module.model, folder / "model", state)
        tokenizer: Any = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if stop_ids := getattr(tokenizer, "stop_ids", ()):          # where answers end, beside what learned it
            settings = model.generation_config(module.model, stop_ids, tokenizer.pad_id)
            settings.save_pretrained(folder / ("adapter" if adapter.is_peft(module.model) else "model"))

    def _point_and_prune(self, newest: Path) -> None:
        disk.replace_text(newest.parent / "LATEST", newest.name + "\n")
        here = {path.name for path in newest.parent.glob("step_*") if path.suffix != ".partial"}
        ranked = sorted((name for name in self.scores if name in here), key=lambda name: (
            self.scores[name] if self.mode == "min" else -self.scores[name], _step(name)))
        if ranked:
            disk.replace_text(newest.parent / "BEST", ranked[0] + "\n")
        keep = {*ranked[: self.keep_best], *sorted(here, key=_step)[-self.keep_last:]}
        for name in here - keep:
            (newest.parent / name / "manifest.json").unlink(missing_ok=True)    # first: half a folder is none
            shutil.rmtree(newest.parent / name, ignore_errors=True)


# ---- folders ---------------------------------------------------------------------------------------------------------

def checkpoints(trainer: L.Trainer) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(trainer.default_root_dir) / "checkpoints"


def find(run: Path, wanted: str) -> Path:
    """A complete checkpoint folder: `last`, `best`, or the path of one.

    Raises:
        InputError: There is none, or a file of it is missing or was changed.
    """
    folder = Path(wanted).expanduser()
    if wanted in ("last", "best"):
        pointer = run / "checkpoints" / {"last": "LATEST", "best": "BEST"}[wanted]
        if not pointer.is_file():
            raise InputError(f"{run} has no {wanted} checkpoint", where="ckpt_path",
                             fix="start a fit without --ckpt_path")
        folder = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise InputError(f"there is no checkpoint folder {wanted}", where="ckpt_path",
                         fix="give `last`, `best`, or a folder like runs/sft/checkpoints/step_40")
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise InputError(f"{folder} has no manifest.json, so it was never completed", where="ckpt_path")
    for name, facts in json.loads(manifest.read_text(encoding="utf-8"))["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != facts["bytes"]:
            raise InputError(f"{file} is missing or has another size than its manifest says", where="ckpt_path",
                             fix="use another checkpoint of the run")
    return folder


def _write_manifest(trainer: L.Trainer, folder: Path, score: float | None) -> None:
    import torch
    import transformers

    module: Any = trainer.lightning_module
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as handle:
            files[str(file.relative_to(folder))] = {
                "bytes": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}
        disk.sync(file)
    facts = {
        "step": trainer.global_step, "epoch": trainer.current_epoch, "score": _finite(score), "base": module.base,
        "peft": module.peft_spec, "world_size": trainer.world_size, "strategy": type(trainer.strategy).__name__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "lightning": L.__version__},
        "files": files,
    }
    _replace(folder / "manifest.json", facts)


def _write_score(manifest: Path, score: float) -> None:
    facts = json.loads(manifest.read_text(encoding="utf-8"))
    _replace(manifest, facts | {"score": _finite(score)})


def _finite(score: float | None) -> float | None:
    return score if score is not None and math.isfinite(score) else None


def _replace(file: Path, facts: dict[str, Any]) -> None:
    disk.replace_text(file, json.dumps(facts, indent=1, default=str) + "\n")


def _step(name: str) -> int:
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdigit() else -1


