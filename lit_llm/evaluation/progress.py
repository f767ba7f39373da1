"""Print on stderr how much of an evaluation or of the answers of a model is done, with tokens/s and the time left."""

from lit_llm.data.tokens.progress import ProgressLine, duration


class Progress:
    """Progress of one pass of a model.

    Args:
        what: Description of the pass, such as `evaluating runs/sft`.
        total: Number of units of the pass.
        unit: What is counted.
        earlier: Number of units that an earlier run has done.
    """

    def __init__(self, what: str, total: int, unit: str = "tokens", earlier: int = 0) -> None:
        self.what, self.total, self.unit, self.earlier = what, total, unit, earlier
        self.done, self.tokens = earlier, 0
        self._line, self._printed = ProgressLine(), False
        if earlier:
            self._line.say(f"{what}: {earlier:,} of {total:,} {unit} are there already")

    def add(self, tokens: int, count: int | None = None) -> None:
        """Count what is done, and print if enough time has passed.

        Args:
            tokens: Tokens that were computed.
            count: Units; null where tokens are the unit.
        """
        self.tokens += tokens
        self.done += tokens if count is None else count
        if self.done == self.earlier or not self._line.is_due():
            return
        self._printed, spent = True, self._line.seconds
        left = duration(spent / (self.done - self.earlier) * (self.total - self.done))
        self._line.say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {self.tokens / spent:,.0f} "
                       f"tokens/s, {left} left", passing=True)

    def end(self, *, always: bool = False) -> float:
        """Print the totals, if progress was printed.

        Args:
            always: Print them also of a short pass in which anything was done.

        Returns:
            Seconds.
        """
        spent, done = self._line.seconds, self.done - self.earlier
        if self._printed or (always and done):
            units = "" if self.unit == "tokens" else f"{done:,} {self.unit}, "
            self._line.say(f"{self.what}: {units}{self.tokens:,} tokens in {duration(spent)}, "
                           f"{self.tokens / max(spent, 1e-9):,.0f} tokens/s")
        return spent
