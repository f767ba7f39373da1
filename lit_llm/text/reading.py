"""A text as tokens: their ids, and which of them begin or end at a character.

A short text is held as the library read it. Of a long one only the ids are held: it was read in stretches, and the one
that holds a character is read once more when somebody asks where its tokens stand.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from lit_llm.text.templates.rendering import Span


class Reading:
    """A text as tokens.

    Where tokens stand is asked of the library a character at a time: all the spans together cost a fifth of reading.

    Args:
        ids: (T,).
        spans: The characters that each stands for, or how to ask for them.
        encoding: The library's; null where the text was read in sections.
        torn: The seams at which the text had to be parted.
    """

    __slots__ = ("_encoding", "_spans", "ids", "torn")

    def __init__(self, ids: list[int], spans: list[Span] | None = None, encoding: Any = None,
                 torn: Sequence[int] = ()) -> None:
        self.ids, self._spans, self._encoding, self.torn = ids, spans, encoding, list(torn)

    @property
    def spans(self) -> list[Span]:
        """(T,) the characters that each token stands for."""
        if self._spans is None:
            self._spans = self._encoding.offsets
        return self._spans

    def begun(self, at: int) -> int:
        """Tokens that begin before a character."""
        clean = self._clean(at)
        return bisect_left(self.spans, at, key=itemgetter(0)) if clean is None else clean

    def ended(self, at: int) -> int | None:
        """Tokens that end there or before; none where one straddles it."""
        if (clean := self._clean(at)) is not None:
            return clean
        count = bisect_right(self.spans, at, key=itemgetter(1))
        return None if count < len(self.ids) and self.spans[count][0] < at else count

    def _clean(self, at: int) -> int | None:
        """The token that begins just there, since the one before has ended; none where the library cannot tell."""
        if self._encoding is None or self._spans is not None:
            return None
        number = self._encoding.char_to_token(at)
        return number if number is not None and self._encoding.token_to_chars(number)[0] == at else None


class Stretch(NamedTuple):
    """A part of a long text whose tokens are its own: none stands across its ends.

    Args:
        start: Its first character, in the whole text.
        stop: Behind its last.
        first: The number of its first token.
        before: What is read before it, for its tokens to be those that they are in the whole text.
        skip: The tokens of that.
        run: Reads a text; null where the stretch is a single control token.
    """

    start: int
    stop: int
    first: int
    before: str
    skip: int
    run: Callable[[str], Reading] | None


class LongReading:
    """A long text as tokens, asked as a `Reading` is.

    Args:
        text: All of it.
        ids: (T,) uint32.
        stretches: What it was read in, in order.
        torn: The seams at which the text had to be parted.
    """

    def __init__(self, text: str, ids: np.ndarray, stretches: Sequence[Stretch], torn: Sequence[int] = ()) -> None:
        self.text, self.ids, self.torn = text, ids, list(torn)
        self._stretches = stretches
        self._last: tuple[int, list[Span]] = (-1, [])

    def begun(self, at: int) -> int:
        """Tokens that begin before a character."""
        number = self._holds(at)
        stretch = self._stretches[number]
        return stretch.first if at == stretch.start else stretch.first + bisect_left(
            self._spans(number), at, key=itemgetter(0))

    def ended(self, at: int) -> int | None:
        """Tokens that end there or before; none where one straddles it."""
        number = self._holds(at)
        stretch = self._stretches[number]
        if at == stretch.start:
            return stretch.first
        spans = self._spans(number)
        count = bisect_right(spans, at, key=itemgetter(1))
        return None if count < len(spans) and spans[count][0] < at else stretch.first + count

    def is_alone(self, at: int, count: int) -> bool:
        """Whether the first `count` ids are those of the text up to a character, read alone."""
        stretch = self._stretches[self._holds(at)]
        if at == stretch.start or stretch.run is None:  # nothing stands across its ends
            return True
        reading = stretch.run(stretch.before + self.text[stretch.start:at])
        return reading.ids[stretch.skip:] == self.ids[stretch.first:count].tolist()

    def _holds(self, at: int) -> int:
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
