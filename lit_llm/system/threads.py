"""Measure the fastest number of CPU threads for this process.

On cores that are also used by others, two threads can be ten times slower than one, because each operation waits for
its slowest part. Measuring is the only way to take the load of a machine into account.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lit_llm.errors import InputError

Threads = int | Literal["auto"]
NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# as set by the user; Lightning sets it later, for this process only
GIVEN = next((f"{name}={os.environ[name]}" for name in NAMES if os.environ.get(name)), None)
ROUNDS, SLICE = 4, 0.03                             # seconds per number of threads in a round
HOPELESS = 3.0                                      # a number that is this many times slower than the best is dropped
LONG = 0.1                                          # seconds after which starting threads is no longer excluded
WORTH = 0.9                                         # required ratio of times for using more threads


@dataclass(frozen=True, slots=True)
class Choice:
    """A number of threads, and the reason.

    Args:
        count: Number of threads.
        why: Reason for the log.
        seconds: Measured seconds by number of threads.
    """

    count: int
    why: str
    seconds: dict[int, float]


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle(wanted: Threads | str, work: Callable[[], Any], *, processes: int = 1, before: int | None = None) -> Choice:
    """Choose this process's threads, and set them.

    A given number takes precedence, then the environment, then that of a stopped run; otherwise it is measured.

    Args:
        wanted: A number, or auto.
        work: Work to measure; it must have no side effects.
        processes: Processes of this run on this machine, which share the cores.
        before: Number of a stopped run: another one would change the order of sums and the last bits of weights.

    Raises:
        InputError: `wanted` is invalid.
    """
    import torch

    if wanted != "auto":
        choice = Choice(number(wanted), "as configured", {})
    elif GIVEN:
        choice = Choice(torch.get_num_threads(), f"as {GIVEN} says", {})
    elif (most := max(1, cores() // processes)) == 1 and before in (None, 1):
        choice = Choice(1, "one core for each process", {})
    else:
        seconds = measure(work, most)
        best = fastest(seconds)
        timings = ", ".join(f"{count} took {1000 * took:.3g} ms" for count, took in seconds.items())
        choice = Choice(best, f"measured: {timings}", seconds)
        if before is not None:
            slow = seconds.get(before, 0) > 1.5 * seconds[best]
            choice = Choice(before, "as before the stop, so that the run ends with the same bits" + (
                f"; {best} would be {seconds[before] / seconds[best]:.1f} times as fast now" if slow else ""), seconds)
    torch.set_num_threads(choice.count)
    return choice


def number(wanted: Threads | str) -> int:
    """Parse a number of threads.

    Raises:
        InputError: It is not a number.
    """
    if not str(wanted).isdecimal() or not 1 <= int(wanted) <= 4096:
        raise InputError(f"'{wanted}' is not a number of threads", where="threads", fix="use auto, or 1 or more")
    return int(wanted)


def measure(work: Callable[[], Any], most: int) -> dict[int, float]:
    """Mean seconds of the work with 1, 2, 4 ... and `most` threads, in turns; torch's setting is restored.

    The mean is used because it is what a run takes: on busy cores some turns are fast by chance.
    """
    import torch

    counts = sorted({*(1 << power for power in range(most.bit_length())), most})
    had, spent, done = torch.get_num_threads(), dict.fromkeys(counts, 0.0), dict.fromkeys(counts, 0)
    try:
        for turn in range(ROUNDS + 1):
            for count in counts:
                means = {tried: spent[tried] / done[tried] for tried in counts if done[tried]}
                if count in means and means[count] > HOPELESS * min(means.values()):
                    continue
                torch.set_num_threads(count)
                begun = now = time.perf_counter()
                while now - begun < SLICE * min(turn, 1) or now == begun:
                    work()
                    now = time.perf_counter()
                    counts_now = turn > 0 or now - begun > LONG      # the first turn starts threads and allocates
                    done[count] += counts_now
                spent[count] += (now - begun) * counts_now
    finally:
        torch.set_num_threads(had)
    return {count: spent[count] / done[count] for count in counts}


def fastest(seconds: dict[int, float]) -> int:
    """The smallest number of threads that no larger one beats by a tenth."""
    best = min(seconds)
    for count in sorted(seconds):
        if seconds[count] < WORTH * seconds[best]:
            best = count
    return best


def training_work(width: int, tokens: int) -> Callable[[], None]:
    """Forward and backward of a layer of this width within some milliseconds, on its own tensors.

    Args:
        width: Width of the model; at most 1,024 are used.
        tokens: Maximum number of tokens of a micro-batch.
    """
    import torch
    from torch.nn import functional as F

    width = max(16, min(width, 1024))
    tokens = max(16, min(tokens, int(1e8 / (66 * width * width))))
    make = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=make)
    up, down = (torch.randn(shape, generator=make).requires_grad_()
                for shape in ((4 * width, width), (width, 4 * width)))
    mix = torch.randn(3 * width, width, generator=make).requires_grad_()

    def work() -> None:
        with torch.enable_grad():
            hidden = F.layer_norm(states, (width,))
            query, key, value = F.linear(hidden, mix).chunk(3, -1)
            hidden = hidden + torch.softmax(query[:256] @ key[:256].T, -1).mean() * value
            (hidden + F.linear(F.silu(F.linear(hidden, up)), down)).square().mean().backward()
        for weight in (up, down, mix):
            weight.grad = None

    return work
