"""Split a long text into pieces that are tokenized separately and give the tokens of the whole text.

The tokenizers library uses about 200 bytes of memory per input byte, so a long text is tokenized in pieces. A text is
split only where both of these conditions hold:

- No token of the vocabulary can span the split. This is looked up in the vocabulary itself, so it holds for texts of
  any length: no merge crosses such a place, and both sides are tokenized independently of each other.
- The 128 characters on each side give the same tokens together and separately, so that no normalization or
  pre-tokenization rule behaves differently because of the split.

At splits of the second kind (between a word and punctuation, for text without spaces), and with models that score
whole words (Unigram), the pre-tokenizer must split the text there as well. A text without such a place within `UNCUT`
characters is refused.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from lit_llm.errors import InputError
from lit_llm.text.tokenizer_limits import panicked

CONTEXT = 128                                           # characters that are compared on each side of a split
PIECE = 1 << 13                                         # characters; larger ones are slower and take more memory
WINDOW = 1 << 15                                        # characters after a piece that are searched at a time
UNCUT = 1 << 19                                         # characters that are tokenized at once if no split is possible
TRIES = 100                                             # candidates of each kind that are tried in a window
SLICE = 1 << 20                                         # characters of a text that are passed on at a time
BETWEEN = re.compile(r"\n(?=\S)|(?<=\S)(?=[ ]\S)")      # at the start of a line or a word
BESIDE = re.compile(r"(?<=[^\W\d_])(?=[^\w\s])|(?<=[^\w\s])(?=[^\W\d_])")      # between a word and punctuation


class Piece(NamedTuple):
    """A section of plain text, the text right before it in its document, and the token count of that text."""

    before: str
    text: str
    skip: int = 0


class UncutError(InputError):
    """A text that cannot be tokenized in pieces."""


class Cutter:
    """Finds the places where a text may be split.

    Args:
        backend: A `tokenizers.Tokenizer`, whose vocabulary decides.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._parted: dict[str, bool] = {}

    def pieces(self, blocks: Iterable[str], backend_of: Any = None) -> Iterator[tuple[Piece, bool, bool]]:
        """Yield the pieces of a text as (piece, is the first, is the last).

        Args:
            blocks: The text, in consecutive blocks.
            backend_of: Returns the backend for a section; null always uses the same one.

        Raises:
            UncutError: `UNCUT` characters without a place to split; the error shows their beginning.
        """
        before, skip, buffer, first, begin, at = "", 0, "", True, 0, PIECE
        for block in chain(blocks, [None]):
            buffer, behind = buffer[begin:] + (block or ""), 2 * CONTEXT if block is None else WINDOW + CONTEXT
            begin = 0
            while len(buffer) - begin >= at + behind:
                place = self._place(buffer, begin + at, min(begin + at + WINDOW, len(buffer) - CONTEXT), backend_of)
                if place:
                    cut, count = place
                    yield Piece(before, buffer[begin:cut], skip), first, False
                    before, skip, first, begin, at = buffer[max(0, cut - CONTEXT):cut], count, False, cut, PIECE
                    continue
                at += WINDOW
                if at > UNCUT:
                    raise UncutError(
                        f"the text has {at:,} characters without a place where the boundary between two tokens is "
                        f"certain, so it cannot be tokenized in pieces; they begin with {buffer[begin:begin + 40]!r}",
                        fix="Put spaces or line breaks into the text, or leave it out.")
        yield Piece(before, buffer[begin:], skip), first, True

    def _place(self, text: str, start: int, stop: int, backend_of: Any) -> tuple[int, int] | None:
        """Where to split, and the token count of the characters right before; None if no place is certain."""
        for kind in (BETWEEN, BESIDE):
            for tries, match in enumerate(kind.finditer(text, start, stop)):
                at = match.end()
                left, right = text[max(0, at - CONTEXT):at], text[at:at + CONTEXT]
                backend = backend_of(left + right) if backend_of else self._backend
                if right and (count := self._clean(backend, left, right, parted=kind is BESIDE)) is not None:
                    return at, count
                if tries == TRIES:
                    break
        return None

    def _clean(self, backend: Any, left: str, right: str, *, parted: bool) -> int | None:
        """The token count of `left`, if the text may be split between `left` and `right`."""
        try:
            left_only, both = (backend.encode(text, add_special_tokens=False) for text in (left, left + right))
        except BaseException as error:                  # a lone surrogate or a panic, which the piece reports later
            if isinstance(error, TypeError) or panicked(error, "") is not error:
                return None
            raise
        count = len(left_only.ids)
        if not 0 < count < len(both.ids) or both.ids[:count] != left_only.ids:
            return None
        ends, begins = both.offsets[count - 1][1], both.offsets[count][0]
        if not ends <= len(left) <= begins:
            return None
        if ((parted and self._splits) or self._scores) and both.word_ids[count - 1] == both.word_ids[count]:
            return None
        if (parted and not self._merges) or self._straddled("".join(both.tokens[:count]), "".join(both.tokens[count:])):
            return None
        return count

    # ---- the vocabulary ------------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> str:
        return type(self._backend.model).__name__

    @property
    def _merges(self) -> bool:
        return self._kind in ("BPE", "Unigram")

    @property
    def _scores(self) -> bool:
        """Whether the model compares sums over a whole word, whose rounding depends on the whole word."""
        return self._kind == "Unigram"

    @property
    def _splits(self) -> bool:
        """Whether a pre-tokenizer splits the text before the model."""
        return self._backend.pre_tokenizer is not None

    @cached_property
    def _spelled(self) -> bytes:
        """All tokens, each enclosed by NUL bytes."""
        return b"\0" + "\0".join(self._backend.get_vocab()).encode("utf-8", "surrogatepass") + b"\0"

    def _straddled(self, left: str, right: str) -> bool:
        """Whether a token could span the split: begin with an end of `left` and end with a start of `right`."""
        pair = left[-1:] + right[:1]
        if pair not in self._parted:
            self._parted[pair] = pair.encode("utf-8", "surrogatepass") not in self._spelled
        if self._parted[pair]:
            return False
        for size in range(1, len(left) + 1):
            if (left[-size:] + right[0]).encode("utf-8", "surrogatepass") not in self._spelled:
                return False                            # no token contains this, so none contains more
            for more in range(1, len(right) + 1):
                across = b"\0" + (left[-size:] + right[:more]).encode("utf-8", "surrogatepass")
                if across not in self._spelled:
                    break
                if across + b"\0" in self._spelled:
                    return True
        return True


def slices(text: str) -> Iterator[str]:
    """Blocks of a text, for `pieces`."""
    return (text[at:at + SLICE] for at in range(0, max(len(text), 1), SLICE))
