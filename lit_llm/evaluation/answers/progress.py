"""Print the progress of generating answers on stderr, with tokens/s and the remaining time."""

import sys
import time

from lit_llm.data.tokens.progress import OFTEN, QUIET, SELDOM, duration


class Progress:
    """Progress of one model.

    Args:
        name: Name of the model.
        total: Number of answers.
        done: Number of answers that an earlier run has generated.
    """

    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.earlier, self.done, self.tokens = name, total, done, done, 0
        self.began = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        if done:
            self._print(f"{name}: {done:,} of {total:,} answers are there already")

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def add(self, tokens: int) -> None:
        """Count an answer, and print the progress if enough time has passed."""
        self.done, self.tokens = self.done + 1, self.tokens + tokens
        now = time.monotonic()
        spent, fresh = now - self.began, self.done - self.earlier
        if spent < QUIET or now - self._shown < (OFTEN if self._terminal else SELDOM):
            return
        self._shown = now
        left = duration(spent / fresh * (self.total - self.done))
        self._print(f"{self.name}: {self.done:,} of {self.total:,} answers, {self.tokens / spent:,.0f} tokens/s, "
                    f"{left} left", end="\r" if self._terminal else "\n")

    def end(self) -> None:
        """Print the totals."""
        if fresh := self.done - self.earlier:
            self._print(f"{self.name}: {fresh:,} answers, {self.tokens:,} tokens in {duration(self.seconds)}, "
                        f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")

    def _print(self, line: str, end: str = "\n") -> None:
        print(f"  {line}" + ("\x1b[K" if self._terminal else ""), end=end, file=sys.stderr, flush=True)
