"""End a run when any of its processes receives a signal: at the end of a step, with a checkpoint, on all ranks.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 only set a flag. Ranks exchange the flags at the end of each step and between
validation batches, and read the result at the next exchange, so no rank waits and collectives keep their order.
"""

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from lit_llm.system import command
from lit_llm.system.private import lightning as private
from lit_llm.system.redaction import redact_words
from lit_llm.training.parallel.processes import Watch, end_together, kill_started, tell_parent
from lit_llm.training.run import manifest
from lit_llm.training.run.checkpoint import StepCheckpoint, validation_is_due

log = logging.getLogger(__name__)
PATIENCE = 5.0                                      # seconds
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGUSR1", "SIGTERM") if hasattr(signal, name)]


class Stopped(SystemExit):
    """Raised when a run stopped on a signal; exit code 143, or 130 after Ctrl-C."""


class Preemption(Callback):
    """Stops a run on a signal.

    Before the first step there is nothing to save, and a signal ends the process immediately. A second Ctrl-C does so
    at any time; the checkpoints on disk are always complete.
    """

    def __init__(self) -> None:
        self.noted = 0                              # the signal that this process received
        self._agreeing = False                      # from the first step on
        self._met = False                           # whether the other ranks have started as well
        self._asked: tuple[Any, torch.Tensor] | None = None
        self.watch: Watch | None = None             # of the other processes

    # ---- death of other processes ------------------------------------------------------------------------------------

    def begin_watch(self, trainer: L.Trainer) -> None:
        """Start watching once all processes of this machine exist."""
        def go_on() -> str:
            if trainer.state.fn != "fit":
                return "its output above may show the reason"
            saved = any(manifest.folders(Path(trainer.default_root_dir)))
            return f"resume with: {resume_command()}" if saved else "nothing was saved"

        self.watch = Watch(trainer, go_on)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop watching."""
        if self.watch is not None:
            self.watch.stop()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Report whether the error follows from the death of another process."""
        if self.watch is not None:
            self.watch.explain(exception)

    # ---- receiving signals -------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, trainer: L.Trainer) -> Generator[None, None, None]:
        """Handle signals during a fit. Lightning's own handlers would make ranks wait forever."""
        private.leave_signals_alone(trainer)
        if threading.current_thread() is not threading.main_thread():
            yield                                   # Python delivers signals to the main thread only
            return
        self.noted, self._agreeing, self._met, self._asked = 0, False, False, None
        owner = os.getpid()

        def note(number: int, _: object) -> None:
            if os.getpid() != owner:                # a forked worker
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            elif number == signal.SIGINT == self.noted:
                os._exit(130)
            else:
                self.noted = max(self.noted, number)
                self._noticed(trainer)

        before = {number: signal.signal(number, note) for number in SIGNALS}
        try:
            with self._handling_signals(trainer):
                yield
        except Exception:
            if not self.noted or self._met:
                raise
            raise _at_once(self.noted, trainer) from None       # another rank received the signal and ended
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _noticed(self, trainer: L.Trainer) -> None:
        if self._agreeing:
            if trainer.is_global_zero and self.noted == signal.SIGINT:
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
            return
        tell_parent(trainer, self.noted)
        raise _at_once(self.noted, trainer)

    @contextmanager
    def _handling_signals(self, trainer: L.Trainer) -> Generator[None, None, None]:
        """Handle signals while torch waits for another process, which blocks Python's handlers, possibly forever.

        A thread also receives the signals, and ends this process if the main thread has not handled one after a while.
        """
        _reset_signal_handlers()
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)

        def hear() -> None:
            while heard := os.read(ear, 1):
                time.sleep(PATIENCE if heard[0] in SIGNALS else 0)
                if heard[0] in SIGNALS and not self.noted and not self._agreeing:
                    tell_parent(trainer, heard[0])
                    os._exit(int(str(_at_once(heard[0], trainer).code)))
            os.close(ear)

        threading.Thread(target=hear, name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(mouth)                         # which ends the thread

    # ---- agreement of ranks ------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, *_: object) -> None:
        """From here on, ranks agree on signals."""
        self._agreeing = True
        self._agreed(trainer)
        signum = self._agreed(trainer)
        self._met = True
        if signum:
            self._end(trainer, signum)

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Check at the end of a step; a due validation starts and then ends immediately."""
        if private.accumulates(trainer) or not (signum := self._agreed(trainer)):
            return
        if not validation_is_due(trainer):
            for keeper in _keepers(trainer):
                keeper.save(trainer)
            self._end(trainer, signum)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Check within a validation, which can be long; the resumed run repeats it."""
        if self._agreeing and not trainer.sanity_checking and (signum := self._agreed(trainer)):
            for keeper in _keepers(trainer):
                keeper.save(trainer, unfinished=True)
            self._end(trainer, signum)

    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        """Check a last time; the run ends anyway."""
        self._agreed(trainer)
        if signum := self._agreed(trainer):
            for keeper in _keepers(trainer):
                keeper.save(trainer)
            self._end(trainer, signum)

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal of any rank at the previous exchange, or 0; starts the next exchange. Collective."""
        if trainer.world_size == 1:
            return self.noted
        answered, self._asked = self._asked, _ask(self.noted, trainer.strategy.root_device)
        if answered is None:
            return 0
        wait, answer = answered
        wait()
        return int(answer)

    # ---- the end of a run --------------------------------------------------------------------------------------------

    def _end(self, trainer: L.Trainer, signum: int) -> None:
        """Print how to resume, requeue the SLURM job, and exit. All ranks call it together."""
        end_together(trainer)
        if trainer.is_global_zero:
            name, step = signal.Signals(signum).name, trainer.global_step
            saved = next(iter(manifest.folders(Path(trainer.default_root_dir))), None) if step else None
            message = f"{name}: stopped after step {step:,}" if step else f"{name}: stopped before the first step"
            message += f", saved in {saved}\n  resume with: {resume_command()}" if saved else "; nothing was saved"
            print(message, file=sys.stderr, flush=True)
            if signum == getattr(signal, "SIGUSR1", None):
                requeue()
        raise Stopped(_code(signum))


@cache
def _reset_signal_handlers() -> None:
    """Reset signal handlers in forked workers, so that ending them does not stop the run."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


def _ask(noted: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    """Start the all-reduce of the ranks' signals: (function that waits for it, result on the host)."""
    value = torch.tensor(noted, device=device)
    work: Any = dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)
    if device.type != "cuda":
        return work.wait, value
    work.wait()                                     # the stream waits, not the host
    host = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return done.synchronize, host


def _at_once(signum: int, trainer: L.Trainer) -> Stopped:
    """The exit before the first step."""
    kill_started(trainer)
    words = f"{signal.Signals(signum).name}: stopped before the first step; nothing was saved\n"
    os.write(2, words.encode())
    return Stopped(_code(signum))


def _code(signum: int) -> int:
    return 130 if signum == signal.SIGINT else 143


def _keepers(trainer: L.Trainer) -> list[StepCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, StepCheckpoint)]


def resume_command() -> str:
    """The command that resumes this run: the same one with `--ckpt_path last`, or a call in a script."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.split(".")[0] != "lit_llm":
        return 'trainer.fit(..., ckpt_path="last")'
    words = iter(sys.argv[1:])
    options = []
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            options.append(word)
    return command.line("lit_llm", *redact_words(options), "--ckpt_path", "last")


def requeue() -> None:
    """Requeue this SLURM job; the restarted job resumes from the last checkpoint."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        failed = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failed = str(error)
    message = f"job {job} could not be requeued: {failed}" if failed else f"job {job} was requeued"
    print(message, file=sys.stderr, flush=True)


def is_requeued() -> bool:
    """Whether SLURM restarted this job."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
