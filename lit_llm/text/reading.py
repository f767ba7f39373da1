"""A tokenized text: its ids, and which tokens begin or end at a character.

A short text keeps the library's encoding. A long text keeps only the ids: it was tokenized in stretches, and a stretch
is tokenized again when the positions of its tokens are needed.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from lit_llm.text.templates.rendering import Span


class Reading:
    """A tokenized text.

    Positions are queried one character at a time, because all spans together take a fifth of the tokenization time.

    Args:
        ids: (T,).
        spans: (start, stop) characters of each token, or null to query the encoding.
        encoding: The library's encoding; null where the text was tokenized in sections.
        torn: Seams at which the text had to be split.
    """

    __slots__ = ("_encoding", "_spans", "ids", "split_at")

    def __init__(self, ids: list[int], spans: list[Span] | None = None, encoding: Any = None,
                 split_at: Sequence[int] = ()) -> None:
        self.ids, self._spans, self._encoding, self.split_at = ids, spans, encoding, list(split_at)

    @property
    def spans(self) -> list[Span]:
        """(T,) the (start, stop) characters of each token."""
        if self._spans is None:
            self._spans = self._encoding.offsets
        return self._spans

    def tokens_started(self, at: int) -> int:
        """Number of tokens that begin before a character."""
        clean = self._token_at(at)
        return bisect_left(self.spans, at, key=itemgetter(0)) if clean is None else clean

    def tokens_finished(self, at: int) -> int | None:
        """Number of tokens that end at or before a character; None where a token spans it."""
        if (clean := self._token_at(at)) is not None:
            return clean
        count = bisect_right(self.spans, at, key=itemgetter(1))
        return None if count < len(self.ids) and self.spans[count][0] < at else count

    def _token_at(self, at: int) -> int | None:
        """Index of the token that begins exactly there; None where the library cannot tell."""
        if self._encoding is None or self._spans is not None:
            return None
        number = self._encoding.char_to_token(at)
        return number if number is not None and self._encoding.token_to_chars(number)[0] == at else None


class Stretch(NamedTuple):
    """A part of a long text that no token leaves or enters.

    Args:
        start: First character, as an offset into the whole text.
        stop: Offset after the last character.
        first: Index of its first token.
        before: Context that is tokenized with it so that its tokens equal those within the whole text.
        skip: Number of tokens of the context.
        run: Tokenizes a text; null where the stretch is a single control token.
    """

    start: int
    stop: int
    first: int
    before: str
    skip: int
    run: Callable[[str], Reading] | None


class LongReading:
    """A long tokenized text with the interface of a `Reading`.

    Args:
        text: The whole text.
        ids: (T,) uint32.
        stretches: Its stretches in order.
        torn: Seams at which the text had to be split.
    """

    def __init__(self, text: str, ids: np.ndarray, stretches: Sequence[Stretch], split_at: Sequence[int] = ()) -> None:
        self.text, self.ids, self.split_at = text, ids, list(split_at)
        self._stretches = stretches
        self._last: tuple[int, list[Span]] = (-1, [])

    def tokens_started(self, at: int) -> int:
        """Number of tokens that begin before a character."""
        number = self._stretch_at(at)
        stretch = self._stretches[number]
        return stretch.first if at == stretch.start else stretch.first + bisect_left(
            self._spans(number), at, key=itemgetter(0))

    def tokens_finished(self, at: int) -> int | None:
        """Number of tokens that end at or before a character; None where a token spans it."""
        number = self._stretch_at(at)
        stretch = self._stretches[number]
        if at == stretch.start:
            return stretch.first
        spans = self._spans(number)
        count = bisect_right(spans, at, key=itemgetter(1))
        return None if count < len(spans) and spans[count][0] < at else stretch.first + count

    def is_prefix(self, at: int, count: int) -> bool:
        """Whether the first `count` ids equal those of the text up to a character, tokenized separately."""
        stretch = self._stretches[self._stretch_at(at)]
        if at == stretch.start or stretch.run is None:  # no token crosses its ends
            return True
        reading = stretch.run(stretch.before + self.text[stretch.start:at])
        return reading.ids[stretch.skip:] == self.ids[stretch.first:count].tolist()

    def _stretch_at(self, at: int) -> int:
        return max(0, bisect_right(self._stretches, at, key=itemgetter(0)) - 1)

    def _spans(self, number: int) -> list[Span]:
        if self._last[0] != number:
            start, stop, _, before, skip, run = self._stretches[number]
            if run is None:
                spans = [(start, stop)]
            else:
                shift = start - len(before)
                spans = [(shift + a, shift + b) for a, b in run(before + self.text[start:stop]).spans[skip:]]
            self._last = number, spans
        return self._last[1]
