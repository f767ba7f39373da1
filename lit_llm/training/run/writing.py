"""Write a checkpoint from all processes: if one of them fails to write, all raise the same error.

An error in only one process would leave the others waiting in a collective. Errors are therefore recorded until all
processes synchronise, and only then raised.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.checkpoint import CheckpointException

from lit_llm import disk
from lit_llm.errors import InputError
from lit_llm.training.parallel import distribution
from lit_llm.training.parallel.processes import end_together
from lit_llm.training.run import manifest

ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)  # torch has a RuntimeError for a full disk
ROOM = 1 << 16                                      # bytes reserved for small files on a full disk


class Writing:
    """Writes one checkpoint.

    Args:
        trainer: The trainer within a fit.
        partial: Temporary folder name until it is complete.
    """

    def __init__(self, trainer: L.Trainer, partial: Path) -> None:
        self.trainer, self.partial, self.run = trainer, partial, Path(trainer.default_root_dir)
        self.error: BaseException | None = None
        self.free = ""
        self._room = partial / "room"

    def begin(self) -> None:
        """Create the folder and a small file that reserves space; called by the first process."""
        if not self.run.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run folder no longer exists", str(self.run))
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._room.write_bytes(bytes(ROOM))

    def release(self) -> None:
        """Free the reserved space."""
        self._room.unlink(missing_ok=True)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record write errors in the block instead of raising them."""
        try:
            yield
        except ERRORS as error:
            self._note(error)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record write errors until every process has passed the next barrier of Lightning or DeepSpeed.

        Some steps between two barriers run in the first process only. An error raised there would leave the other
        processes waiting in the barrier forever.
        """
        writers = distribution.of(self.trainer.strategy).writers()
        for owner, name in writers:
            setattr(owner, name, self._keeping(getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in writers:
                delattr(owner, name)                # restore the class's method

    def _keeping(self, write: Callable[..., object]) -> Callable[..., Any]:
        def keep(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except ERRORS as error:
                self._note(error)
                for path in (*args, *kwargs.values()):      # partial files take space that later files need
                    if isinstance(path, str | os.PathLike):
                        with suppress(OSError):
                            os.unlink(path)

        return keep

    def _note(self, error: BaseException) -> None:
        if self.error is None:
            self.error, self.free = error, disk.free(self.run)
        with suppress(OSError):
            self.release()

    def agree(self, what: str) -> None:
        """Continue on all processes, or raise on all of them. Collective.

        Args:
            what: What is being written.

        Raises:
            InputError: A process could not write; the partial checkpoint is removed.
        """
        if self.trainer.strategy.reduce_boolean_decision(self.error is None, all=True):
            return
        error, free = self._first()
        if self.trainer.is_global_zero:
            shutil.rmtree(self.partial, ignore_errors=True)
        end_together(self.trainer)
        raise unwritable(self.run, error, what, free) from self.error

    def _first(self) -> tuple[OSError, str]:
        """The first error of any process, and the free space that it saw."""
        mine = (None if self.error is None else disk.number_of(self.error), disk.reason(self.error), self.free)
        errors: list[Any] = [mine] * self.trainer.world_size
        if self.trainer.world_size > 1:
            dist.all_gather_object(errors, mine)
        number, message, free = next(error for error in errors if error[1])
        return OSError(number, message), free


def of_writing(run: Path, error: OSError) -> bool:
    """Whether an error comes from writing the run folder, not from reading data or a connection."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    name = error.filename2 or error.filename
    return isinstance(name, str | os.PathLike) and Path(name).absolute().is_relative_to(run.absolute())


def unwritable(run: Path, error: BaseException, what: str = "the record of the run", free: str = "") -> InputError:
    """The error for a file of a run that could not be written, with the checkpoint to resume from.

    Args:
        run: The run folder.
        error: Error of the system or a library.
        what: What should have been written.
        free: Description of the free space; empty measures it now.
    """
    room = f"; {free or disk.free(run)}" if disk.is_full(error) else ""
    whole = next((folder for folder in manifest.folders(run) if next(manifest.faults(folder), None) is None), None)
    then = f"then resume from {whole} with --ckpt_path last" if whole else "and start again: there is no checkpoint yet"
    return InputError(f"{what} could not be written: {disk.reason(error)}{room}", where=str(run),
                      fix=f"{disk.remedy(error, run)}, {then}")
