"""Run a few steps of a config in separate processes, without touching the run itself.

The child processes run the real command, `python -m lit_llm fit`, with a callback of this module.
"""

import copy
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import nn

from lit_llm.errors import InputError
from lit_llm.system import class_paths
from lit_llm.training.parallel.shards import gathered_gradients

KEEP = ("seed_everything", "model", "data", "trainer")
OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
       "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT")


def fit(config: dict[str, Any] | None, folder: Path, watch: Callback, options: Sequence[str] = (),
        more: Sequence[dict[str, Any]] = (), **changes: Any) -> None:
    """Train for some steps without validation, loggers or user callbacks.

    Args:
        config: Config of the run with all keys.
        folder: Run folder of the trial.
        watch: A callback of this module, rebuilt in the child process from its `args`.
        options: More command-line options.
        more: Other callbacks by class_path.
        changes: Keys of the config by dotted names, `__` for the dot: trainer__max_steps=4.

    Raises:
        InputError: The trial failed; the error quotes the end of its output.
    """
    if config is None:
        raise InputError("a trial needs the run's config", fix="python -m lit_llm VERB --config FILE")
    config = {key: value for key, value in copy.deepcopy(config).items() if key in KEEP}
    callbacks = [{"class_path": f"{type(watch).__module__}.{type(watch).__name__}", "init_args": vars(watch)["args"]}]
    changes = {"trainer__max_epochs": -1, "trainer__max_time": None, "trainer__logger": None,
               "trainer__limit_val_batches": 0, "trainer__num_sanity_val_steps": 0, "trainer__fast_dev_run": False,
               "trainer__enable_progress_bar": False, "trainer__log_every_n_steps": 1,
               "trainer__default_root_dir": str(folder)} | changes
    for name, value in changes.items():
        *path, key = name.split("__")
        part = config
        for step in path:
            part = part[step]
        part[key] = value
    config["trainer"]["callbacks"] = [*callbacks, *more]
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    environ = {key: value for key, value in os.environ.items() if key not in OWN}
    allowed = [f"{class_paths.OPTION}={package}" for package in class_paths.opened]     # typed by the user
    done = subprocess.run([sys.executable, "-m", "lit_llm", "fit", "--config", str(file), *options, *allowed],
                          env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        begin = next((at for at, line in enumerate(lines) if line.startswith("error: ")), len(lines) - 1)
        raise InputError("\n".join(lines[begin : begin + 3]).removeprefix("error: ")[:600],
                         where=f"a trial of the run ended with exit code {done.returncode}")


class Quiet(Callback):
    """A trial without an export."""

    def __init__(self) -> None:
        self.args: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disable the export."""
        trainer.exports = False  # type: ignore[attr-defined]


class Clock(Quiet):
    """Times steps two and three and measures the memory of step four; step one allocates and compiles.

    Args:
        file: File for rank 0's measurements.
    """

    STEPS = 4

    def __init__(self, file: str) -> None:
        self.args, self.file = {"file": file}, Path(file)
        self._begun, self._seconds, self._tokens, self._live_before = 0.0, 0.0, 0, 0
        self._profile: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock at the second step, stop it before the fourth."""
        step = trainer.global_step
        if step == 1 and not self._begun:
            self._begun = _now(module.device)
        if step in (1, 2):
            self._tokens += int(batch["num_tokens"]) * trainer.world_size
        if step == self.STEPS - 1 and not self._seconds:
            self._seconds = _now(module.device) - self._begun
            if module.device.type == "cpu":
                from torch.profiler import ProfilerActivity, profile

                self._live_before = live_bytes()
                self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self._profile.__enter__()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Write the measurements."""
        if not self._seconds:
            return
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            peak = self._live_before + _peak_bytes(self._profile)
        else:
            peak = torch.cuda.max_memory_allocated(module.device)
        if trainer.is_global_zero:
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            seen = {"seconds": self._seconds / 2, "tokens_per_second": self._tokens / self._seconds,
                    "peak_bytes": peak, "resident_bytes": resident}
            self.file.write_text(json.dumps(seen), encoding="utf-8")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def live_bytes() -> int:
    """Bytes of all CPU tensors that Python can see, each storage once."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and type(thing) in (
                torch.Tensor, nn.Parameter):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _peak_bytes(profile: Any) -> int:
    """Peak bytes of torch's allocator above its initial state."""
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


class Gradient(Quiet):
    """Runs one step on the first `rows` packed sequences and stores its complete gradient.

    Args:
        file: File for rank 0's gradient.
        rows: Number of packed sequences, as in the run.
        apart: Whether to unpack them, with one document or conversation per sequence.
    """

    def __init__(self, file: str, rows: int, apart: bool = False) -> None:
        self.args = {"file": file, "rows": rows, "apart": apart}
        self.file, self.rows, self.apart = Path(file), rows, apart

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restrict the data to these sequences, and make all their micro-batches one step."""
        super().setup(trainer, pl_module, stage)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        plan = data.plans["train"]
        rows = plan.rows.take(np.arange(min(self.rows, len(plan.rows))))
        if self.apart:
            rows = replace(rows, offsets=np.arange(len(rows.segments) + 1)).counted(rows.segment_supervised)
        data.plans["train"] = replace(plan, rows=rows, draw=None)
        trainer.accumulate_grad_batches = -(-len(rows) // (data.batch_size * trainer.world_size))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Disable dropout, which would differ between divisions."""
        for layer in module.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
            elif isinstance(getattr(layer, "attention_dropout", None), float):
                layer.attention_dropout = 0.0  # type: ignore[assignment]

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: object) -> None:
        """Store the gradient before clipping."""
        gradients = gathered_gradients(module)
        if trainer.is_global_zero:
            torch.save(gradients, self.file)
