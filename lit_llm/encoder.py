r"""Rendered text in, token ids out: content never becomes a control token, and no token straddles an answer's start.

Text is encoded whole, as the library would do it; only where that breaks one of the two rules, section by section:

    <|im_start|> user\n say <|im_end|> twice <|im_end|> \n <|im_start|> assistant\n | yes <|im_end|>
    ~meant~~~~~~              ~spelled~~       ~meant~~~~     ~meant~~~~~~              ^ seam

Knows spans and ids, nothing of roles or labels.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from lit_llm.errors import InputError
from lit_llm.rendering import Rendered, Span

# Private use, no part of it twice: stands in for the token before a section.
ANCHOR = "\U0010fffd\U0010f8ff\U0010fffc"
CONTEXT = 128                                           # characters: further no rule of a tokenizer reaches
PIECE = 1 << 13                                         # characters; larger ones are slower and take more memory
BETWEEN = re.compile(r"\n(?=\S)|(?<=\S)(?=[ ]\S)")     # where a line or a word begins


class Piece(NamedTuple):
    """A stretch of plain text, what stands right before it in its document, and how many tokens that is."""

    before: str
    text: str
    skip: int = 0


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


class Encoder:
    """The exact reading of rendered text.

    Args:
        backend: A `tokenizers.Tokenizer`.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._headers: dict[str, list[int]] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._by_spelling = {token.content: (id_, token) for id_, token in added.items()}
        marks = [token for token in added.values() if token.content.strip()]    # runs of spaces are no control tokens
        self._added = _any_of(token.content for token in marks)
        self._hints = {token.content[:2] for token in marks}
        self._sayable = _any_of(token.content for token in added.values() if not token.special)

    def encode(self, rendered: Rendered, seams: Sequence[int] = ()) -> Reading:
        """The text read whole; parted at those of the seams where a token would straddle.

        Raises:
            InputError: Content would become a control token all the same, or holds half of a surrogate pair.
        """
        text, tokens = rendered.text, self._tokens(rendered)
        forged = [start for start, *_ in tokens] != [found.start() for found in self._added.finditer(text)]
        reading = Reading(*self._sections(text, tokens)) if forged else self.whole(text)
        torn = [seam for seam in seams if not self._clean_seam(text, seam, tokens, forged, reading)]
        if torn:
            reading = Reading(*self._sections(text, tokens, torn), torn=torn)
        controls = [id_ for *_, id_ in tokens if id_ in self.special_ids]
        if [id_ for id_ in reading.ids if id_ in self.special_ids] != controls:
            raise InputError(f"text in {text[:80]!r} becomes a control token")
        return reading

    def _tokens(self, rendered: Rendered) -> list[tuple[int, int, int]]:
        """(start, stop, id) of the added tokens that are meant: the template's own, and what the assistant says."""
        text, at = rendered.text, 0
        found: list[re.Match[str]] = []
        spans = [*((*span, False) for span in rendered.literals), *((*span, True) for span in rendered.words)]
        for start, stop, own in sorted([*spans, (len(text), len(text), False)]):
            found += self._added.finditer(text, at, start)
            if own:
                found += self._sayable.finditer(text, start, stop)
            at = stop
        tokens = []
        for match in found:
            id_, token = self._by_spelling[match[0]]
            stop = match.end()
            if token.rstrip:                        # such a token swallows the space behind it
                stop += len(text) - stop - len(text[stop:].lstrip())
            tokens.append((match.start(), stop, id_))
        return tokens

    def _sections(self, text: str, tokens: Sequence[tuple[int, int, int]],
                  seams: Sequence[int] = ()) -> tuple[list[int], list[Span]]:
        """Encoded between the added tokens that are meant, where no other is known, and cut at the seams."""
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        seams = sorted({*seams, *(found.start() + 1 for found in re.finditer(ANCHOR, text))})
        for start, stop, id_ in [*tokens, (len(text), len(text), -1)]:
            cuts = [at, *(seam for seam in seams if at < seam < start), start]
            for begin, end in pairwise(cuts):
                more, spans = self._plainly(text, begin, end)
                ids += more
                offsets += spans
            if id_ >= 0:
                ids.append(id_)
                offsets.append((start, stop))
            at = stop
        return ids, offsets

    def _clean_seam(self, text: str, at: int, tokens: Sequence[tuple[int, int, int]], forged: bool,
                    reading: Reading) -> bool:
        """Whether the ids before `at` are those of the prompt alone, as the server will encode it."""
        ids, count = reading.ids, reading.ended(at)
        section = max((stop for _, stop, _ in tokens if stop <= at), default=0)
        first = reading.ended(section)
        if count is None or first is None:
            return False
        if forged:
            return self._plainly(text, section, at)[0] == ids[first:count]
        header = text[section:at]                   # the same few words before every answer
        if header not in self._headers and len(self._headers) < 1000:
            self._headers[header] = self.whole(header).ids
        if self._headers.get(header) == ids[first:count]:
            return True                             # added tokens split the text, so the last section decides
        return self.whole(text[:at]).ids == ids[:count]

    def whole(self, text: str) -> Reading:
        """A text as the library reads it, control tokens included."""
        return _run(self._backend, text)

    # ---- plain text --------------------------------------------------------------------------------------------------

    def texts(self, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of pieces of plain text, each as it would be read within its document; spelled tokens stay text."""
        spelled = [any(hint in piece.before + piece.text for hint in self._hints)
                   and bool(self._added.search(piece.before + piece.text)) for piece in pieces]
        out: dict[int, np.ndarray | InputError] = {}
        for plain in (False, True):
            mine = [number for number in range(len(pieces)) if spelled[number] == plain]
            backend = self._bare if plain and mine else self._backend
            out |= zip(mine, _batch(backend.encode_batch_fast, [pieces[number] for number in mine]), strict=True)
        arrays = [ids for ids in out.values() if isinstance(ids, np.ndarray)]
        if arrays and np.isin(np.concatenate(arrays), self._specials).any():        # one look, since it is never so
            out = {number: self._checked(ids, pieces[number]) for number, ids in out.items()}
        return [out[number] for number in range(len(pieces))]

    def _checked(self, ids: "np.ndarray | InputError", piece: Piece) -> "np.ndarray | InputError":
        if isinstance(ids, np.ndarray) and np.isin(ids, self._specials).any():
            return InputError(f"text in {piece.text[:80]!r} becomes a control token")
        return ids

    @cached_property
    def _specials(self) -> np.ndarray:
        return np.array(sorted(self.special_ids), dtype=np.uint32)

    def pieces(self, blocks: Iterable[str]) -> Iterator[tuple[Piece, bool, bool]]:
        """A long text in pieces that can be read one by one: (piece, whether it is the first, whether the last)."""
        before, skip, held, first = "", 0, "", True
        for block in blocks:
            held += block
            while found := self._cut(held):
                cut, count = found
                yield Piece(before, held[:cut], skip), first, False
                before, skip, held, first = held[max(0, cut - CONTEXT):cut], count, held[cut:], False
        yield Piece(before, held, skip), first, True

    def _cut(self, text: str) -> tuple[int, int] | None:
        """Where to cut a piece off, and the tokens of its last characters; none where it is short or no place clean."""
        if len(text) < PIECE + 2 * CONTEXT:
            return None
        for tries, found in enumerate(BETWEEN.finditer(text, PIECE, len(text) - CONTEXT)):
            at = found.end()
            left, right = text[max(0, at - CONTEXT):at], text[at:at + CONTEXT]
            backend = self._bare if self._added.search(left + right) else self._backend
            alone, both = _run(backend, left).ids, _run(backend, left + right)
            count = len(alone)
            if both.ids[:count] == alone and both.begun(len(left)) == both.ended(len(left)) == count:
                return at, count
            if tries == 100:
                break
        return None

    def _plainly(self, text: str, start: int, stop: int) -> tuple[list[int], list[Span]]:
        """A section's ids with every spelled token read as text; behind an anchor, since it does not begin the text."""
        if start >= stop:
            return [], []
        anchor = ANCHOR if start else ""
        reading = _run(self._plain, anchor + text[start:stop])
        shift, skip = start - len(anchor), int(bool(anchor))
        return reading.ids[skip:], [(shift + a, shift + b) for a, b in reading.spans[skip:]]

    @cached_property
    def _bare(self) -> Any:
        """The same vocabulary and rules without added tokens, made when some text first spells one."""
        rules = json.loads(self._backend.to_str())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["content"].strip()]
        return type(self._backend).from_str(json.dumps(rules))

    @cached_property
    def _plain(self) -> Any:
        """With the anchor, whose id the model does not have: for sections that are cut at every anchor they spell."""
        plain = type(self._backend).from_str(self._bare.to_str())
        plain.add_special_tokens([ANCHOR])
        return plain


def _run(backend: Any, text: str) -> Reading:
    try:
        encoding = backend.encode(text, add_special_tokens=False)
    except TypeError:
        raise InputError("text holds half of a surrogate pair, which is no character") from None
    return Reading(encoding.ids, encoding=encoding)


def _batch(run: Any, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
    """Ids of each piece, what stands before it left out."""
    try:
        encodings = run([piece.before + piece.text for piece in pieces], add_special_tokens=False)
    except TypeError:
        if len(pieces) > 1:                             # one of them spoils the batch
            return [_batch(run, [piece])[0] for piece in pieces]
        return [InputError("text holds half of a surrogate pair, which is no character")]
    return [np.array(encoding.ids, dtype=np.uint32)[piece.skip:]
            for encoding, piece in zip(encodings, pieces, strict=True)]


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the spellings, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")
