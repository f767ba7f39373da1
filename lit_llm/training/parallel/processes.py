"""End all processes of a run together, and distinguish a common decision from the death of one process.

If a process dies, the others do not wait for it and the user is informed. This concerns Lightning's launcher, which
starts the other ranks of a machine; torchrun and SLURM handle it themselves.
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

PARENT = os.getppid()                               # once it has ended, another one adopts this process
PAUSE, GRACE = 0.5, 10.0                            # seconds: between two checks; for processes to end by themselves


class Watch:
    """Ends this process if another one of the run died, because its collectives would wait, on CUDA for half an hour.

    Args:
        trainer: The trainer after its launcher ran.
        go_on: Returns advice for the user.
    """

    def __init__(self, trainer: L.Trainer, go_on: Callable[[], str]) -> None:
        self.go_on, self.rank = go_on, trainer.local_rank
        launcher: Any = trainer.strategy.launcher
        self.started: list[subprocess.Popen[bytes]] = list(getattr(launcher, "procs", ()))
        self.parent = os.getppid() if is_started_by_another(trainer) else None
        self._over = threading.Event()
        if self.started or self.parent is not None:
            private.dismiss_watcher()
            threading.Thread(target=self._look, name="rank-watch", daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._over.set()

    def explain(self, error: BaseException) -> None:
        """Handle an error of this process; does not return if another process died."""
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            self._over.wait(2 * GRACE)              # meanwhile the watching thread ends this process
        self.stop()

    def _look(self) -> None:
        while not self._over.wait(PAUSE):
            lost, killed = self._lost()
            if not lost or self._over.wait(PAUSE if killed else GRACE):
                continue
            if self.rank <= (self.parent is not None):      # one process reports for all remaining ones
                os.write(2, f"error: {lost}, which ended the run\n  {self.go_on()}\n".encode())
            for process in self.started:
                process.kill()
            os._exit(1)

    def _lost(self) -> tuple[str, bool]:
        """Which process ended, and whether by a signal; otherwise it had an error that may occur here as well."""
        if self.parent is not None and os.getppid() != self.parent:
            return "the process of rank 0 has ended", True
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
    """Prepare all ranks for raising the same error, so that none is killed because another was first. Collective."""
    private.dismiss_watcher()
    _stop_watch(trainer)
    trainer.strategy.barrier()


def tell_parent(trainer: L.Trainer, signum: int) -> None:
    """Forward a signal to the parent process, which would wait for this one."""
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
