"""All processes of a run, ending together: what each decided alike must not look like one of them dying.

Knows Lightning's launcher, which starts the other ranks of a machine and kills them all when one ends with an error.
"""

import signal
import threading
from typing import Any

import lightning as L
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

WATCHER = "child-process-observer"                  # Lightning's thread


def end_together(trainer: L.Trainer) -> None:
    """Before all ranks raise the same error: from here on none is killed because another was first. A collective."""
    for thread in threading.enumerate():
        if thread.name == WATCHER:
            thread._run = lambda: True  # type: ignore[attr-defined]
    trainer.strategy.barrier()


def is_started_by_another(trainer: L.Trainer) -> bool:
    """Whether this is a rank that Lightning started from rank 0 of its machine, rather than torchrun or SLURM."""
    launcher: Any = trainer.strategy.launcher
    return (isinstance(launcher, _SubprocessScriptLauncher) and trainer.local_rank > 0
            and type(launcher.cluster_environment).__name__ == "LightningEnvironment")


def kill_started(trainer: L.Trainer) -> None:
    """End the ranks that this process started, whatever they wait for."""
    launcher: Any = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
