"""Read a checkpoint that another number of processes wrote: weights, optimizer state, and where the run stands.

ZeRO 1 and 2 cut the optimizer's state into as many parts as there were processes; DeepSpeed's universal checkpoint
(arXiv:2406.18820) puts each weight's state together again, and every process takes its part of it. Lightning counts
micro-batches of one process; their number in a step changes where the steps stay the same.
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
    """The folder of a checkpoint of ZeRO 1 or 2 that any number of processes can load, for as long as it is needed.

    Takes the disk of the optimizer state once more meanwhile, beside the checkpoint's own folder. A collective.

    Args:
        state: What DeepSpeed wrote.
        first: Whether this is the process that converts.
        barrier: Waits for all processes.
    """
    folder = state.parent.parent / f"universal_{state.parent.name}"
    if first:
        shutil.rmtree(folder, ignore_errors=True)   # of a run that was killed here
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
        folder: What DeepSpeed wrote.
        stage_3: Whether this run is stage 3.
        world: Processes of this run.
        fitting: Whether it trains.

    Raises:
        InputError: DeepSpeed did not write the folder, another stage did, or stage 3 did and the number of processes
            is another one or nothing is trained.
    """
    shards = folder / "checkpoint"
    writers = len(list(shards.glob("*_optim_states.pt")))
    written_by_3 = any(shards.glob("zero_pp_rank_*_model_states.pt"))
    if not writers:
        raise InputError("this is not a folder that DeepSpeed wrote", where=str(folder))
    if written_by_3 != stage_3:
        wrote, reads = ("stage 3", "1 or 2") if written_by_3 else ("stage 1 or 2", "3")
        raise InputError(f"written by {wrote}, cannot be read by stage {reads}", where=str(folder),
                         fix=f"Set --trainer.strategy deepspeed_stage_{3 if written_by_3 else 2}")
    if written_by_3 and writers != world and fitting:
        raise InputError(f"written by stage 3 with {writers} processes, cannot be read by {world}", where=str(folder),
                         fix=f"Resume with --trainer.devices {writers}")
    if written_by_3 and not fitting:
        raise InputError("shards of stage 3 can only be resumed by fit", where=str(folder),
                         fix="Evaluate the exported folder: --model.base <run>/export")
    return writers


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.parent.mkdir(parents=True)
    settings = Namespace(input_folder=str(source), output_folder=str(target), num_extract_workers=1,
                         num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as said:     # it talks and draws bars
        ds_to_universal.main(settings)
    for line in said.getvalue().splitlines():
        if line.startswith(library_warnings.BEGINNING):
            print(line, file=sys.stderr, flush=True)


def recount(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Make Lightning's counters those of a run with another number of micro-batches in a step, in place.

    Checkpoints stand at step ends, so the count is whole. `completed` may lag by one: Lightning counts a batch after
    the callback that saved.

    Args:
        checkpoint: Lightning's, with the writer's number under `ACCUMULATE`.
        accumulate: Micro-batches of a step now.

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
