"""Call a benchmark's function in a process of its own and return its result.

So contestants do not share warm caches, threads or memory. Rounds are interleaved, so that a machine that is slow for a
while affects all of them.
"""

import inspect
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = [place for place in [os.environ.get("PYTHONPATH")] if place]
CALL = "import json, sys; from tests.benchmarks.{} import {} as call; print(json.dumps(call(*json.loads(sys.argv[1]))))"


def start(function: Callable[..., Any], *arguments: Any, python: str = sys.executable) -> subprocess.Popen:
    """The function under way, in a session of its own; it leaves its result on the last line it prints."""
    code = CALL.format(Path(inspect.getfile(function)).stem, function.__name__)
    return subprocess.Popen([python, "-c", code, json.dumps(arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *PATHS])}, start_new_session=True)


def alone(function: Callable[..., Any], *arguments: Any, python: str = sys.executable) -> Any:
    """What the function returns."""
    process = start(function, *arguments, python=python)
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{function.__name__}{arguments} ended with {process.returncode}")
    return json.loads(out.splitlines()[-1])


def medians(rounds: int, contestants: dict[str, Callable[[], dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Each contestant's figures, the median of each over the rounds."""
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            seen[name].append(call())
    return {name: {key: statistics.median(figures[key] for figures in all_of) for key in all_of[0]}
            for name, all_of in seen.items()}


@contextmanager
def watch() -> Iterator[dict[str, float]]:
    """`seconds` on the wall and `cpu` seconds of this process and those that it started and that have ended."""
    def cpu() -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(of.ru_utime + of.ru_stime for of in both)

    figures: dict[str, float] = {}
    began, spent = time.perf_counter(), cpu()
    yield figures
    figures.update(seconds=time.perf_counter() - began, cpu=cpu() - spent)


def members(group: int) -> list[int]:
    """Living processes of a session that `start` began."""
    out = subprocess.run(["ps", "-eo", "sid,pid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in out.splitlines()[1:]]
    return [int(pid) for sid, pid, stat in rows if int(sid) == group and not stat.startswith("Z")]


def memory(group: int) -> tuple[float, float]:
    """Megabytes of a session's processes together: their own with a share of what they share, and summed as `top` does."""
    own = whole = 0
    for pid in members(group):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:                             # it has ended
            continue
        sizes = {line.split()[0]: int(line.split()[1]) for line in lines[1:]}
        own, whole = own + sizes["Pss:"], whole + sizes["Rss:"]
    return own / 1024, whole / 1024
