"""Set the number of CPU threads of every process of a run before its first forward pass, and store it in checkpoints.

The number of threads changes the order of floating-point additions, so a resumed run keeps its number. `threads.py`
measures the fastest number.
"""

import logging
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lit_llm.system import ranges, threads

log = logging.getLogger(__name__)


class ThreadCount(Callback):
    """Sets torch's threads on CPUs; on a GPU only an explicitly given number is used.

    Args:
        wanted: A number, or auto.
    """

    def __init__(self, wanted: threads.Threads = "auto") -> None:
        ranges.check("trainer.threads", wanted)
        self.wanted = wanted
        self._ranks: list[int] = []                 # threads of the stopped run

    def state_dict(self) -> dict[str, Any]:
        """Numbers of threads of all ranks. Collective."""
        ranks: list[Any] = [torch.get_num_threads()]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, torch.get_num_threads())
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the numbers until the first step."""
        self._ranks = list(state_dict["ranks"])

    def settle(self, trainer: L.Trainer) -> None:
        """Choose, set and log the number of threads before the first forward pass."""
        if trainer.strategy.root_device.type != "cpu" and self.wanted == "auto":
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        config: Any = getattr(getattr(trainer.lightning_module, "model", None), "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        width, tokens = getattr(config, "hidden_size", None) or 512, 1024
        if hasattr(data, "seq_len"):
            tokens = data.seq_len * getattr(data, "batch_size", 1)
        before = self._ranks[trainer.global_rank] if len(self._ranks) == trainer.world_size else None
        choice = threads.settle(self.wanted, threads.training_work(int(width), int(tokens)),
                                processes=int(trainer.num_devices), before=before)
        if trainer.is_global_zero and threads.cores() > 1:
            log.info("threads: %d of %d cores, %s (--trainer.threads N sets it)", choice.count, threads.cores(),
                     choice.why)
