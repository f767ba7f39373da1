"""Write `run.json` and the report of a run: after each validation, at the end, and after a stop or an error.

Nothing here may end a run or make processes wait for each other: rank 0 writes alone, and errors are warnings.
"""

import json
import logging
import os
import platform
import socket
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from lit_llm import disk
from lit_llm.report import facts, writing
from lit_llm.system import class_paths
from lit_llm.system.redaction import redact
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.saved import SavedModule
from lit_llm.training.planning import devices, estimate, footprint
from lit_llm.training.record.forgetting import Forgetting
from lit_llm.training.record.speed import Speed

log = logging.getLogger(__name__)
PACKAGES = ("lit_llm", "torch", "transformers", "lightning", "peft", "deepspeed", "bitsandbytes")
ADDED = ("seconds", "training_seconds", "report_seconds", "guard_seconds", "tokens")     # sums over all lives of a run
TERA, GIB = 1e12, 2**30


class RunRecord(Callback):
    """Records the state, cost and surroundings of a run, and writes its report.

    Args:
        speed: Counts the tokens and the time of the steps.
        forgetting: Measures the guard documents.
    """

    def __init__(self, speed: Speed, forgetting: Forgetting) -> None:
        self.speed, self.forgetting = speed, forgetting
        self._facts: dict[str, Any] = {}            # of run.json that do not change; empty before the first step
        self._earlier: dict[str, float] = {}        # sums of earlier lives of a resumed run
        self._begun = self._report_seconds = 0.0
        self._due = False                           # whether a validation has ended, whose checkpoint comes next

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the record of the start."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._begun, self._report_seconds = time.monotonic(), 0.0
        earlier = facts.mapping(Path(trainer.default_root_dir) / facts.RUN) if trainer.global_step else {}
        self._earlier = {name: value for name in ADDED if isinstance(value := earlier.get(name), int | float)}
        self._facts = {
            "started": earlier.get("started") or _now(), "host": socket.gethostname(), "pid": os.getpid(),
            "planned_steps": _finite(trainer.estimated_stepping_batches),
            **_model_facts(trainer), "allow": list(class_paths.opened), "versions": _versions(),
            "hardware": _hardware(trainer)}
        self._write(trainer, "running", report=False)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the report at the next micro-batch, when the checkpoint of this validation is complete."""
        self._due = trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Write the report that is due."""
        if self._due:
            self._due = False
            self._write(trainer, "running")

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Write the report of a finished run; after an error `on_exception` has written it."""
        if stage == "fit":
            self._write(trainer, "finished", self.forgetting.reason)
            self._facts = {}

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Write the report of a run that was stopped or failed after its first step."""
        stopped = isinstance(exception, SystemExit | KeyboardInterrupt)
        if trainer.global_step and trainer.state.fn == "fit":
            self._write(trainer, "stopped" if stopped else "failed", None if stopped else disk.reason(exception))
        self._facts = {}

    def _write(self, trainer: L.Trainer, state: str, reason: str | None = None, *, report: bool = True) -> None:
        run = Path(trainer.default_root_dir)
        if not self._facts or not run.is_dir():
            return
        begun = time.monotonic()
        sums = {"seconds": begun - self._begun, "training_seconds": self.speed.seconds,
                "report_seconds": self._report_seconds, "guard_seconds": self.forgetting.seconds,
                "tokens": self.speed.tokens}
        sums = {name: value + self._earlier.get(name, 0) for name, value in sums.items()}
        now = {"state": state, "reason": reason, "step": trainer.global_step, "updated": _now()}
        record = now | self._facts | sums
        try:
            disk.replace_text(run / facts.RUN, json.dumps(redact(record), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            log.warning("%s could not be written: %s", run / facts.RUN, disk.reason(error))
        if report:
            writing.try_to_write(run)
        self._report_seconds += time.monotonic() - begun


def _model_facts(trainer: L.Trainer) -> dict[str, Any]:
    """Base, method, parameters and FLOPs per token; null where they are not known."""
    module: Any = trainer.lightning_module
    entries: dict[str, Any] = {"base": None, "method": None, "parameters": None, "flops_per_token": None,
                             "peak_flops": _peak_flops(trainer)}
    if not isinstance(module, SavedModule):
        return entries
    entries |= {"base": module.base, "method": (module.peft_spec or {}).get("class_path") or "all weights"}
    if distribution.of(trainer.strategy).split_stage == 3:
        return entries                                # a process has a part of each weight
    try:
        whole = module.model
        inner = whole.get_base_model() if module.peft_spec is not None else whole
        counts = footprint.count(whole, inner, quantized=module.quantize is not None)
        entries["parameters"] = {"total": counts.total, "trained": counts.trained}
        lengths = trainer.datamodule.plans["train"].rows.segments.lengths  # type: ignore[attr-defined]
        reach = float(np.square(lengths.astype(np.float64)).sum() / lengths.sum())
        entries["flops_per_token"] = estimate.flops_per_token(counts, reach)
    except Exception as error:                      # models and data of another kind: the report says "not known"
        log.debug("FLOPs of this run are not known: %s", error)
    return entries


def _peak_flops(trainer: L.Trainer) -> float | None:
    """FLOP/s of all devices in their data sheets; null for a CPU and for devices that are not in the table."""
    if trainer.strategy.root_device.type != "cuda":
        return None
    device = devices.here(trainer.strategy.root_device)
    rate = device.half if "16" in str(trainer.precision) else device.single
    return rate * TERA * trainer.world_size or None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda and torch.cuda.is_available() else {})


def _hardware(trainer: L.Trainer) -> dict[str, Any]:
    device = trainer.strategy.root_device
    entries = {"system": platform.platform(), "processes": trainer.world_size, "precision": str(trainer.precision),
             "strategy": type(trainer.strategy).__name__, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
             "machine_memory_gib": round(devices.installed_memory() / GIB, 1)}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return {"device": about.name, "device_memory_gib": round(about.total_memory / GIB, 1)} | entries
    return {"device": platform.processor() or platform.machine()} | entries


def _finite(steps: float) -> int | None:
    return int(steps) if np.isfinite(steps) and steps > 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S")
