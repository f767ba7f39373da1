"""All processes of a run, ending together: what each decided alike must not look like one of them dying.

Where one did die, nobody waits for it and the user is told.
Knows Lightning's launcher, which starts the other ranks of a machine; under torchrun and SLURM those see to it.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import lightning as L
import torch.distributed as dist

from lit_llm.system.private import lightning as private

PARENT = os.getppid()                               # once it is gone, another one adopts this process
PAUSE, GRACE = 0.5, 10.0                            # seconds: between two looks; for them to find out


class Watch:
    """Ends this process where another one of the run died: its collectives would wait, on CUDA for half an hour.

    Args:
        trainer: After its launcher ran.
        go_on: What to type next.
    """

    def __init__(self, trainer: L.Trainer, go_on: Callable[[], str]) -> None:
        self.go_on, self.rank = go_on, trainer.local_rank
        launcher: Any = trainer.strategy.launcher
        self.started: list[subprocess.Popen] = list(getattr(launcher, "procs", ()))
        self.parent = os.getppid() if is_started_by_another(trainer) else None
        self._over = threading.Event()
        if self.started or self.parent is not None:
            private.dismiss_watcher()
            threading.Thread(target=self._look, name="rank-watch", daemon=True).start()

    def stop(self) -> None:
        """From here on the others may end as they like."""
        self._over.set()

    def explain(self, error: BaseException) -> None:
        """After an error of this process: does not return where it came from the death of another."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._over.wait(2 * GRACE)              # the watching thread ends this process meanwhile
        self.stop()

    def _look(self) -> None:
        while not self._over.wait(PAUSE):
            lost, killed = self._lost()
            if not lost or self._over.wait(PAUSE if killed else GRACE):
                continue
            if self.rank <= (self.parent is not None):      # one process speaks for all that are left
                os.write(2, f"error: {lost}, and with it the run\n  {self.go_on()}\n".encode())
            for process in self.started:
                process.kill()
            os._exit(1)

    def _lost(self) -> tuple[str, bool]:
        """Who is gone, and whether by a signal; who ended itself had an error, which may be on its way here, too."""
        if self.parent is not None and os.getppid() != self.parent:
            return "the process of rank 0 is gone", True
        for rank, process in enumerate(self.started, 1):
            if code := process.poll():
                how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
                return f"the process of rank {rank} was ended {how}", code < 0
        return "", False


def _stop_watch(trainer: L.Trainer) -> None:
    watch = getattr(getattr(trainer, "preemption", None), "watch", None)
    if watch is not None:
        watch.stop()


def end_together(trainer: L.Trainer) -> None:
    """Before all ranks raise the same error: from here on none is killed because another was first. A collective."""
    private.dismiss_watcher()
    _stop_watch(trainer)
    trainer.strategy.barrier()


def tell_parent(trainer: L.Trainer, signum: int) -> None:
    """Pass a signal on to the process that started this one, which would wait for it."""
    if is_started_by_another(trainer) and os.getppid() == PARENT:
        os.kill(PARENT, signum)


def is_started_by_another(trainer: L.Trainer) -> bool:
    """Whether this is a rank that Lightning started from rank 0 of its machine, rather than torchrun or SLURM."""
    launcher: Any = trainer.strategy.launcher
    return (private.starts_processes(launcher) and trainer.local_rank > 0
            and type(launcher.cluster_environment).__name__ == "LightningEnvironment")


def kill_started(trainer: L.Trainer) -> None:
    """End the ranks that this process started, whatever they wait for."""
    _stop_watch(trainer)
    launcher: Any = trainer.strategy.launcher
    if private.starts_processes(launcher):
        launcher.kill(signal.SIGKILL)
