"""Print on stderr how much of an evaluation is done, and the remaining time."""

import sys
import time

from lit_llm.data.tokens.progress import OFTEN, QUIET, SELDOM, duration


class Progress:
    """Progress of one pass; nothing is printed within its first two seconds.

    Args:
        what: Description of the pass, such as `evaluating runs/sft`.
        total: Tokens of the pass.
    """

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.began = self.shown = time.monotonic()
        self._terminal, self._printed = sys.stderr.isatty(), False

    def add(self, tokens: int) -> None:
        """Count tokens that are done, and print if enough time has passed."""
        self.done += tokens
        now = time.monotonic()
        spent = now - self.began
        if spent < QUIET or not self.done or now - self.shown < (OFTEN if self._terminal else SELDOM):
            return
        self.shown, self._printed = now, True
        left = spent / self.done * (self.total - self.done)
        self._say(f"{self.what}: {self.done:,} of {self.total:,} tokens, {self.done / spent:,.0f} tokens/s, "
                  f"{duration(left)} left", end="\r" if self._terminal else "\n")

    def end(self) -> float:
        """Print the total time if progress was printed.

        Returns:
            Seconds.
        """
        spent = time.monotonic() - self.began
        if self._printed:
            self._say(f"{self.what}: {self.done:,} tokens in {duration(spent)}")
        return spent

    def _say(self, line: str, end: str = "\n") -> None:
        print(f"  {line}" + ("\x1b[K" if self._terminal else ""), end=end, file=sys.stderr, flush=True)
