"""Save and restore the random states of all processes, so that a resumed run draws the same random numbers.

Lightning does not save them, and under DDP and ZeRO only rank 0's state would be kept, so ranks exchange theirs.
"""

import logging
import os
import random
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)


class RngState(Callback):
    """Stores the states of the generators of torch, CUDA, numpy and Python of each rank in checkpoints."""

    def __init__(self) -> None:
        self._ranks: list[dict[str, Any]] | None = None
        self._seed: str | None = None               # seed at the beginning of the run

    def state_dict(self) -> dict[str, Any]:
        """States of all ranks, a few kB each. Collective."""
        ranks: list[Any] = [current()]
        if dist.is_available() and dist.is_initialized():
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, current())
        return {"ranks": ranks, "seed": self._seed or os.environ.get("PL_GLOBAL_SEED")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first step."""
        self._ranks, self._seed = state_dict["ranks"], state_dict.get("seed")

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore the state of each rank; with another number of ranks the states are not used."""
        if self._ranks is not None and len(self._ranks) == trainer.world_size:
            restore(self._ranks[trainer.global_rank])
            now = os.environ.get("PL_GLOBAL_SEED")
            if self._seed and now and now != self._seed and trainer.is_global_zero:
                log.warning("seed_everything %s -> %s has no effect: a resumed run continues its own random numbers",
                            self._seed, now)
        self._ranks = None


def current() -> dict[str, Any]:
    """States of this process's generators as tensors, numbers and lists, which torch loads without running code."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, state, gauss = random.getstate()
    states = {"torch": torch.get_rng_state(), "python": [version, list(state), gauss],
              "numpy": [torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached]}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(state: dict[str, Any]) -> None:
    """Set this process's generators to a result of `current`."""
    torch.set_rng_state(state["torch"].cpu())
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
