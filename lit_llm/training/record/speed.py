"""Log tokens per second and peak memory at the logged steps."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_llm.report.rows import MEMORY, SPEED
from lit_llm.system.private import lightning as private

GIB = 2**30


class Speed(Callback):
    """Counts tokens and the time of optimizer steps: with waiting for data, without validations.

    The first logged step includes the start of kernels and workers.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0          # of all processes, in this fit
        self._begun: float | None = None            # since when the clock runs; null in a validation
        self._logged = (0, 0.0)                     # tokens and seconds at the last logged step

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to count."""
        self.tokens, self.seconds, self._logged = 0, 0.0, (0, 0.0)
        self._begun = time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Let the clock run again after a validation and what follows it."""
        if self._begun is None:
            self._begun = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any,
                           batch_idx: int) -> None:
        """Count a micro-batch, and log at the end of a logged step."""
        if isinstance(batch, Mapping) and "num_tokens" in batch:        # a data module of the user may give others
            self.tokens += int(batch["num_tokens"]) * trainer.world_size
        if private.accumulates(trainer) or not private.logs_this_step(trainer):
            return
        self._count()
        tokens, seconds = self.tokens - self._logged[0], self.seconds - self._logged[1]
        self._logged = self.tokens, self.seconds
        if tokens:
            module.log(SPEED, tokens / max(1e-9, seconds), rank_zero_only=True)
        module.log(MEMORY, peak_bytes(trainer.strategy.root_device) / GIB, rank_zero_only=True)

    def on_validation_start(self, trainer: L.Trainer, *_: object) -> None:
        """Stop the clock."""
        self._count()
        self._begun = None

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Stop the clock."""
        self._count()
        self._begun = None

    def on_exception(self, trainer: L.Trainer, *_: object) -> None:
        """Stop the clock."""
        self._count()
        self._begun = None

    def _count(self) -> None:
        if self._begun is not None:
            now = time.monotonic()
            self.seconds, self._begun = self.seconds + now - self._begun, now


def peak_bytes(device: torch.device) -> int:
    """Peak bytes that torch allocated on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
