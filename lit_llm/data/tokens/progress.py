"""Print the progress of preparing a source on stderr, with tokens/s and the remaining time.

Nothing is printed if it takes less than two seconds.
"""

import sys
import time
from pathlib import Path

from lit_llm.data.records.record import Place
from lit_llm.data.records.textfile import PACKED
from lit_llm.data.tokens.cache import size_of
from lit_llm.data.tokens.store import Report

MUCH = 1_000_000_000                                    # bytes of a cache above which its size is printed
QUIET, OFTEN, SELDOM = 2.0, 0.5, 10.0                   # seconds: before the first line; on a terminal; in a log


class ProgressLine:
    """A line of progress on stderr, at most every half second on a terminal and every ten seconds in a log.

    Nothing is due within the first two seconds.
    """

    def __init__(self) -> None:
        self.began = self.shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def is_due(self) -> bool:
        """Whether enough time has passed since the last line; if so, the next one is `passing`."""
        now = time.monotonic()
        if now - self.began < QUIET or now - self.shown < (OFTEN if self._terminal else SELDOM):
            return False
        self.shown = now
        return True

    def say(self, text: str, *, passing: bool = False) -> None:
        """Print a line; on a terminal, a passing one is replaced by the next."""
        print(f"  {text}" + ("\x1b[K" if self._terminal else ""), end="\r" if passing and self._terminal else "\n",
              file=sys.stderr, flush=True)


class Progress:
    """Progress of one source.

    Args:
        name: Name of the source.
        sizes: Bytes of each file; empty for the hub, where the total is unknown.
    """

    def __init__(self, name: str, sizes: dict[str, int]) -> None:
        self.line = ProgressLine()
        self.name, self.sizes = name, sizes
        self.total = sum(self.sizes.values())
        self._before = dict(zip(self.sizes, _running(list(self.sizes.values())), strict=True))

    def show(self, report: Report, place: Place) -> None:
        """Print the progress if enough time has passed.

        Args:
            report: The report so far.
            place: Place of the last record that is done.
        """
        if not self.line.is_due():
            return
        spent, share = self.line.seconds, self.share(place)
        left = f", {share:.0%} done, {duration(spent / share - spent)} left" if share else ""
        self.line.say(f"preparing {self.name}: {report.read:,} records, {report.tokens:,} tokens, "
                       f"{report.tokens / spent:,.0f} tokens/s{left}", passing=True)

    def share(self, place: Place) -> float:
        """Share of the source's bytes that are done: 0 to 1; 0 if unknown.

        For a compressed file only the files before it are counted.
        """
        size = self.sizes.get(place.path, 0)
        read = 0.0 if place.path.lower().endswith(PACKED) else place.share
        return (self._before[place.path] + size * read) / self.total if size else 0.0

    def end(self, report: Report, root: Path) -> None:
        """Print the totals if it took a while, and the size of a large cache, which is never emptied automatically."""
        spent = self.line.seconds
        if spent < QUIET:
            return
        self.line.say(f"prepared {self.name}: {report.read:,} records, {report.tokens:,} tokens in "
                       f"{duration(spent)}, {report.tokens / spent:,.0f} tokens/s")
        stores, size = size_of(root)
        if size > MUCH:
            self.line.say(f"the token cache {root} contains {stores} store{'s' * (stores > 1)}, {size / 1e9:,.1f} GB; "
                           "you may delete it at any time")


def _running(sizes: list[int]) -> list[int]:
    """Sum of the sizes before each.

    >>> _running([3, 4, 5])
    [0, 3, 7]
    """
    return [sum(sizes[:number]) for number in range(len(sizes))]


def duration(seconds: float) -> str:
    """Format seconds.

    >>> duration(7.2), duration(200), duration(7300)
    ('7 s', '3 min 20 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
