"""Call a function on a sequence of arguments in several processes, or in this one, and yield the results in order.

`Exchange` sends values between ranks.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from lit_llm.errors import InputError

ALONE = 4 << 20                                         # bytes below which one process is faster than several


def process_count(num_proc: int | None, size: int | None, *, shared_by: int = 1) -> int:
    """Number of tokenizing processes.

    Args:
        num_proc: The configured number; null uses all cores, or one process for little data.
        size: Bytes of the files; null if unknown.
        shared_by: Ranks on this machine that share its cores.
    """
    if num_proc is not None:
        return max(1, num_proc)
    if size is not None and size < ALONE:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // shared_by)


class Workers:
    """Worker processes for one function; they end when this process ends.

    Args:
        work: The function; it and its results must be picklable.
        count: Number of processes; 1 is this process.
    """

    def __init__(self, work: Callable[[Any], Any], count: int) -> None:
        self.work, self._pool = work, None if count == 1 else _pool(work, count)

    def submit(self, what: object) -> Callable[[], Any]:
        """Submit work; calling the returned function waits for the result.

        Raises:
            InputError: Raised by that call: an error of the function, or its process was killed.
        """
        if self._pool is None:
            return lambda: self.work(what)
        try:
            with _ctrl_c_later():
                future = self._pool.submit(_do, what)
        except BrokenProcessPool:
            raise _killed() from None
        return lambda: _result(future)

    def close(self) -> None:
        """Cancel work that has not started."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _pool(work: Callable[[Any], Any], count: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(work, os.getpid()))


@contextmanager
def _ctrl_c_later() -> Generator[None, None, None]:
    """Delay Ctrl-C until after the block: the first submit forks, and exceptions in fork hooks are lost."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


_work: Any = None                                       # the function, in a process of the pool


def _begin(work: object, parent: int) -> None:
    """Initialise a worker: store the function, end when the parent ends, and ignore Ctrl-C."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _do(what: object) -> Any:
    return _work(what)


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise _killed() from None


def _killed() -> InputError:
    return InputError("a tokenizing process was killed, possibly because memory ran out", where="data.num_proc",
                      fix="Set --data.num_proc 1, or free some memory.")


class Exchange:
    """Exchange a value of each rank with all ranks, on the CPU in a separate process group."""

    def __init__(self) -> None:
        self._group: Any = None

    def __call__(self, mine: object) -> list[Any]:
        """The values in rank order. Collective."""
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=self._group)
        return every
