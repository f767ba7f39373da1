"""Read a checkpoint that another number of processes wrote: weights, optimizer state and loop counters.

ZeRO 1 and 2 shard the optimizer's state over the processes. DeepSpeed's universal checkpoint (arXiv:2406.18820) joins
the shards of each weight, and every process then loads its new shard. Lightning counts the micro-batches of one
process, whose number per step differs with another number of processes.
"""

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from lit_llm.errors import InputError
from lit_llm.system import library_warnings

ACCUMULATE = "accumulate_grad_batches"              # key in a checkpoint


@contextmanager
def universal(state: Path, *, first: bool, barrier: Callable[[], None]) -> Generator[Path, None, None]:
    """A temporary copy of a ZeRO 1 or 2 checkpoint that any number of processes can load. Collective.

    It needs the disk space of the optimizer state once more, beside the checkpoint's own folder.

    Args:
        state: The folder that DeepSpeed wrote.
        first: Whether this is the process that converts.
        barrier: Waits for all processes.
    """
    folder = state.parent.parent / f"universal_{state.parent.name}"
    if first:
        shutil.rmtree(folder, ignore_errors=True)   # left by a run that was killed here
        _convert(state / "checkpoint", folder / "checkpoint")
    barrier()
    try:
        yield folder
    finally:
        barrier()
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def check_shards(folder: Path, *, stage_3: bool, world: int, fitting: bool) -> int:
    """The number of processes that wrote a checkpoint's shards, if this run can read them.

    Args:
        folder: The folder that DeepSpeed wrote.
        stage_3: Whether this run uses stage 3.
        world: Number of processes of this run.
        fitting: Whether it trains.

    Raises:
        InputError: DeepSpeed did not write the folder, or another stage wrote it, or stage 3 wrote it with another
            number of processes or for a run that trains.
    """
    shards = folder / "checkpoint"
    writers = len(list(shards.glob("*_optim_states.pt")))
    written_by_3 = any(shards.glob("zero_pp_rank_*_model_states.pt"))
    if not writers:
        raise InputError("the folder is not a checkpoint of DeepSpeed", where=str(folder))
    if written_by_3 != stage_3:
        wrote, reads = ("stage 3", "1 or 2") if written_by_3 else ("stage 1 or 2", "3")
        raise InputError(f"the checkpoint was written by ZeRO {wrote} and cannot be read by stage {reads}",
                         where=str(folder),
                         fix=f"set --trainer.strategy deepspeed_stage_{3 if written_by_3 else 2}")
    if written_by_3 and writers != world and fitting:
        raise InputError(f"the checkpoint was written by ZeRO stage 3 with {writers} processes and cannot be read by "
                         f"{world}", where=str(folder), fix=f"resume with --trainer.devices {writers}")
    if written_by_3 and not fitting:
        raise InputError("a checkpoint of ZeRO stage 3 can only be resumed by fit", where=str(folder),
                         fix="evaluate the exported model: --model.base <run>/export")
    return writers


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.parent.mkdir(parents=True)
    settings = Namespace(input_folder=str(source), output_folder=str(target), num_extract_workers=1,
                         num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as output:     # it prints text and progress bars
        ds_to_universal.main(settings)
    for line in output.getvalue().splitlines():
        if line.startswith(library_warnings.BEGINNING):
            print(line, file=sys.stderr, flush=True)


def recount(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Convert Lightning's counters in place for a run with another number of micro-batches per step.

    Checkpoints are written at the end of steps, so the result is an integer. `completed` may be one less, because
    Lightning counts a batch after the callback that saves.

    Args:
        checkpoint: Lightning's checkpoint, with the writer's number under `ACCUMULATE`.
        accumulate: Number of micro-batches per step in this run.

    >>> counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    >>> progress = {"epoch_loop.batch_progress": {"total": counts, "current": dict(counts)}}
    >>> recount({"accumulate_grad_batches": 2, "loops": {"fit_loop": progress}}, 1)
    >>> counts
    {'ready': 3, 'started': 3, 'processed': 3, 'completed': 2}
    """
    before = int(checkpoint.get(ACCUMULATE, accumulate))
    if before == accumulate:
        return
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        lag = counts["ready"] - counts["completed"]
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // before * accumulate
        counts["completed"] = counts["ready"] - lag
