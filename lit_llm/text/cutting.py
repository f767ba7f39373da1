"""Cut a long text into pieces that are encoded one by one and give the tokens of the whole.

The library takes some 200 bytes of memory for each byte that it reads, so a long text is read in pieces. A cut is made
only where both of these hold:

- No token of the vocabulary can stand across it. This is looked up in the vocabulary itself, so it holds for texts of
  any length: merges never reach over such a place, and the two sides are read independently of each other.
- The 128 characters on each side give the same tokens together and apart, so that no rule that normalizes or splits
  text behaves otherwise because of the cut.

Where the second kind of place is used (between a word and punctuation, for text without spaces), and with a model that
scores whole words (Unigram), the splitting rules must part the text there, too. A text without such a place within
`UNCUT` characters is refused.
"""

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

from lit_llm.errors import InputError
from lit_llm.text.tokenizer_limits import panicked

CONTEXT = 128                                           # characters that are looked at on each side of a cut
PIECE = 1 << 13                                         # characters; larger ones are slower and take more memory
WINDOW = 1 << 15                                        # characters behind a piece that are searched at a time
UNCUT = 1 << 19                                         # characters that are read at once where no cut is possible
TRIES = 100                                             # places that are tried in a window, of each kind
SLICE = 1 << 20                                         # characters of a text that are handed on at a time
BETWEEN = re.compile(r"\n(?=\S)|(?<=\S)(?=[ ]\S)")      # where a line or a word begins
BESIDE = re.compile(r"(?<=[^\W\d_])(?=[^\w\s])|(?<=[^\w\s])(?=[^\W\d_])")      # between a word and punctuation


class Piece(NamedTuple):
    """A stretch of plain text, what stands right before it in its document, and how many tokens that is."""

    before: str
    text: str
    skip: int = 0


class UncutError(InputError):
    """That a text cannot be read in pieces."""


class Cutter:
    """Finds the places where a text may be cut.

    Args:
        backend: A `tokenizers.Tokenizer`: its vocabulary counts.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._parted: dict[str, bool] = {}

    def pieces(self, blocks: Iterable[str], backend_of: Any = None) -> Iterator[tuple[Piece, bool, bool]]:
        """A text in pieces: (piece, whether it is the first, whether the last).

        Args:
            blocks: The text.
            backend_of: Gives the backend that reads a stretch of it; null is always the same one.

        Raises:
            UncutError: `UNCUT` characters without a place to cut; it shows how they begin.
        """
        before, skip, held, first, begin, at = "", 0, "", True, 0, PIECE
        for block in chain(blocks, [None]):
            held, behind = held[begin:] + (block or ""), 2 * CONTEXT if block is None else WINDOW + CONTEXT
            begin = 0
            while len(held) - begin >= at + behind:
                found = self._place(held, begin + at, min(begin + at + WINDOW, len(held) - CONTEXT), backend_of)
                if found:
                    cut, count = found
                    yield Piece(before, held[begin:cut], skip), first, False
                    before, skip, first, begin, at = held[max(0, cut - CONTEXT):cut], count, False, cut, PIECE
                    continue
                at += WINDOW
                if at > UNCUT:
                    raise UncutError(
                        f"{at:,} characters in which no place was found where tokens are sure to part, so that they "
                        f"cannot be read in pieces; they begin with {held[begin:begin + 40]!r}",
                        fix="Put spaces or line ends into the text, or leave it out.")
        yield Piece(before, held[begin:], skip), first, True

    def _place(self, text: str, start: int, stop: int, backend_of: Any) -> tuple[int, int] | None:
        """Where to cut, and the tokens of the characters right before it; none where no place is sure."""
        for kind in (BETWEEN, BESIDE):
            for tries, found in enumerate(kind.finditer(text, start, stop)):
                at = found.end()
                left, right = text[max(0, at - CONTEXT):at], text[at:at + CONTEXT]
                backend = backend_of(left + right) if backend_of else self._backend
                if right and (count := self._clean(backend, left, right, parted=kind is BESIDE)) is not None:
                    return at, count
                if tries == TRIES:
                    break
        return None

    def _clean(self, backend: Any, left: str, right: str, *, parted: bool) -> int | None:
        """How many tokens `left` is, if it may be cut from `right`."""
        try:
            alone, both = (backend.encode(text, add_special_tokens=False) for text in (left, left + right))
        except BaseException as error:                  # half of a surrogate pair, or a panic; the piece will say so
            if isinstance(error, TypeError) or panicked(error, "") is not error:
                return None
            raise
        count = len(alone.ids)
        if not 0 < count < len(both.ids) or both.ids[:count] != alone.ids:
            return None
        ends, begins = both.offsets[count - 1][1], both.offsets[count][0]
        if not ends <= len(left) <= begins:
            return None
        if ((parted and self._splits) or self._scores) and both.word_ids[count - 1] == both.word_ids[count]:
            return None
        if (parted and not self._merges) or self._straddled("".join(both.tokens[:count]), "".join(both.tokens[count:])):
            return None
        return count

    # ---- what the vocabulary says ------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> str:
        return type(self._backend.model).__name__

    @property
    def _merges(self) -> bool:
        return self._kind in ("BPE", "Unigram")

    @property
    def _scores(self) -> bool:
        """Whether it compares sums over a whole word, whose rounding depends on all of it."""
        return self._kind == "Unigram"

    @property
    def _splits(self) -> bool:
        """Whether rules split a text before it is read."""
        return self._backend.pre_tokenizer is not None

    @cached_property
    def _spelled(self) -> bytes:
        """All tokens, each between two NULs."""
        return b"\0" + "\0".join(self._backend.get_vocab()).encode("utf-8", "surrogatepass") + b"\0"

    def _straddled(self, left: str, right: str) -> bool:
        """Whether some token could stand across the cut: end a part of `left`, and begin one of `right`."""
        pair = left[-1:] + right[:1]
        if pair not in self._parted:
            self._parted[pair] = pair.encode("utf-8", "surrogatepass") not in self._spelled
        if self._parted[pair]:
            return False
        for size in range(1, len(left) + 1):
            if (left[-size:] + right[0]).encode("utf-8", "surrogatepass") not in self._spelled:
                return False                            # no token holds that much, so none holds more
            for more in range(1, len(right) + 1):
                across = b"\0" + (left[-size:] + right[:more]).encode("utf-8", "surrogatepass")
                if across not in self._spelled:
                    break
                if across + b"\0" in self._spelled:
                    return True
        return True


def slices(text: str) -> Iterator[str]:
    """A text in blocks, for `pieces`."""
    return (text[at:at + SLICE] for at in range(0, max(len(text), 1), SLICE))
