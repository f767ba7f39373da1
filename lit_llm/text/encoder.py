r"""Encode rendered text; content never becomes a control token, and no token spans the start of an answer.

Text is encoded whole, as the library would do it; only where that breaks one of the two rules, section by section:

    <|im_start|> user\n say <|im_end|> twice <|im_end|> \n <|im_start|> assistant\n | yes <|im_end|>
    ~meant~~~~~~              ~spelled~~       ~meant~~~~     ~meant~~~~~~              ^ seam

A text of more than `WHOLE` characters is read in pieces, to the same ids (`cutting.py`), so that memory is some tens of
bytes for each of its bytes.

Knows spans and ids, nothing of roles or labels.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np

from lit_llm.errors import InputError
from lit_llm.text.cutting import Cutter, Piece, slices
from lit_llm.text.reading import LongReading, Reading, Stretch
from lit_llm.text.templates.rendering import Rendered, Span
from lit_llm.text.tokenizer_limits import panicked

# Private use, no part of it twice: stands in for the token before a section.
ANCHOR = "\U0010fffd\U0010f8ff\U0010fffc"
WHOLE = 1 << 18                                         # characters that the library reads at once
HEADER = 1000                                           # characters of what stands before an answer, to be remembered
SEAMS = 64                                              # answers of which each costs little more than the text
SURROGATE = "text holds half of a surrogate pair, which is no character"
SPACES = re.compile(r"\s*")


class Encoder:
    """The exact reading of rendered text.

    Args:
        backend: A `tokenizers.Tokenizer`.
        source: Its folder, for messages.
    """

    def __init__(self, backend: Any, source: str = "") -> None:
        self._backend, self._source = backend, source
        self._headers: dict[str, list[int]] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._by_spelling = {token.content: (id_, token) for id_, token in added.items()}
        marks = [token for token in added.values() if token.content.strip()]    # runs of spaces are no control tokens
        self._added = _any_of(token.content for token in marks)
        self._hints = {token.content[:2] for token in marks}
        self._sayable = _any_of(token.content for token in added.values() if not token.special)

    def encode(self, rendered: Rendered, seams: Sequence[int] = ()) -> Reading | LongReading:
        """The text read whole; parted at those of the seams where a token would straddle.

        Raises:
            InputError: Content would become a control token all the same, it holds half of a surrogate pair, or it is
                long and cannot be read in pieces.
        """
        text, tokens = rendered.text, self._tokens(rendered)
        forged = [start for start, *_ in tokens] != [found.start() for found in self._added.finditer(text)]
        size = len(text) * max(1, len(seams) // SEAMS)      # each seam may ask for all that stands before it
        reading = self._parted(text, tokens, size=size) if forged else self.whole(text, size)
        torn = [seam for seam in seams if not self._clean_seam(text, seam, tokens, forged, reading)]
        if torn:
            reading = self._parted(text, tokens, torn, size=size)
        controls = [id_ for *_, id_ in tokens if id_ in self.special_ids]
        if self._controls(reading.ids) != controls:
            raise InputError(f"text in {text[:80]!r} becomes a control token")
        return reading

    def _controls(self, ids: "list[int] | np.ndarray") -> list[int]:
        """The control tokens among some ids."""
        if isinstance(ids, list):
            return [id_ for id_ in ids if id_ in self.special_ids]
        return [int(id_) for id_ in ids[np.isin(ids, self._specials)]]

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
                stop = SPACES.match(text, stop).end()       # type: ignore[union-attr]
            tokens.append((match.start(), stop, id_))
        return tokens

    def _parted(self, text: str, tokens: Sequence[tuple[int, int, int]], seams: Sequence[int] = (),
                size: int = 0) -> Reading | LongReading:
        """Encoded between the added tokens that are meant, where no other is known, and cut at the seams."""
        if size <= WHOLE:
            return Reading(*self._sections(text, tokens, seams), torn=seams)
        ids: list[np.ndarray] = []
        stretches: list[Stretch] = []
        count = 0
        for start, stop, id_ in self._cuts(text, tokens, seams):
            if id_ >= 0:
                new = [(Stretch(start, stop, count, "", 0, None), np.array([id_], dtype=np.uint32))]
            else:
                new = list(self._stretches(self._plain, text, start, stop, count, ANCHOR if start else ""))
            for stretch, more in new:
                stretches.append(stretch)
                ids.append(more)
                count += len(more)
        return LongReading(text, np.concatenate(ids), stretches, seams)

    def _sections(self, text: str, tokens: Sequence[tuple[int, int, int]],
                  seams: Sequence[int] = ()) -> tuple[list[int], list[Span]]:
        """The same of a short text: all ids, and where they stand."""
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop, id_ in self._cuts(text, tokens, seams):
            more, spans = ([id_], [(start, stop)]) if id_ >= 0 else self._plainly(text, start, stop)
            ids += more
            offsets += spans
        return ids, offsets

    def _cuts(self, text: str, tokens: Sequence[tuple[int, int, int]],
              seams: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of the added tokens that are meant, and with -1 of the sections between them."""
        at = 0
        seams = sorted({*seams, *(found.start() + 1 for found in re.finditer(ANCHOR, text))})
        for start, stop, id_ in [*tokens, (len(text), len(text), -1)]:
            inside = seams[bisect_right(seams, at):bisect_left(seams, start)]
            yield from ((begin, end, -1) for begin, end in pairwise([at, *inside, start]) if begin < end)
            if id_ >= 0:
                yield start, stop, id_
            at = stop

    def _stretches(self, backend: Any, text: str, start: int, stop: int, first: int = 0,
                   anchor: str = "") -> Iterator[tuple[Stretch, np.ndarray]]:
        """A section of a long text in pieces, each with its ids."""
        at, run = start - len(anchor), partial(self._run, backend)
        for piece, *_ in self._cutter.pieces(slices(anchor + text[start:stop]), lambda _: backend):
            end = at + len(piece.text)
            before, skip = (anchor, int(bool(anchor))) if at < start else (piece.before, piece.skip)
            ids = np.array(run(piece.before + piece.text).ids[max(skip, piece.skip):], dtype=np.uint32)
            yield Stretch(max(at, start), end, first, before, skip, run), ids
            at, first = end, first + len(ids)

    def _clean_seam(self, text: str, at: int, tokens: Sequence[tuple[int, int, int]], forged: bool,
                    reading: Reading | LongReading) -> bool:
        """Whether the ids before `at` are those of the prompt alone, as the server will encode it."""
        ids, count = reading.ids, reading.ended(at)
        section = max((stop for _, stop, _ in tokens if stop <= at), default=0)
        first = reading.ended(section)
        if count is None or first is None:
            return False
        header = text[section:at]                   # the same few words before every answer
        if not forged and len(header) <= HEADER:
            if header not in self._headers and len(self._headers) < 1000:
                self._headers[header] = self._run(self._backend, header).ids
            if self._headers.get(header) == [int(id_) for id_ in ids[first:count]]:
                return True                         # added tokens split the text, so the last section decides
        if isinstance(reading, LongReading):        # its stretches are read independently
            return reading.is_alone(at, count)
        if forged:
            return self._plainly(text, section, at)[0] == ids[first:count]
        return self._run(self._backend, text[:at]).ids == ids[:count]

    def whole(self, text: str, size: int = 0) -> Reading | LongReading:
        """A text as the library reads it, control tokens included; in pieces where `size` is more than `WHOLE`."""
        if size <= WHOLE:
            return self._run(self._backend, text)
        stretches, ids = zip(*self._stretches(self._backend, text, 0, len(text)), strict=True)
        return LongReading(text, np.concatenate(ids), stretches)

    # ---- plain text --------------------------------------------------------------------------------------------------

    def texts(self, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of pieces of plain text, each as it would be read within its document; spelled tokens stay text."""
        if any(len(piece.text) > WHOLE for piece in pieces):
            return [self._in_pieces(piece) if len(piece.text) > WHOLE else self._together([piece])[0]
                    for piece in pieces]
        return self._together(pieces)

    def _in_pieces(self, whole: Piece) -> "np.ndarray | InputError":
        """The same of a long one, some pieces at a time; one that was cut before could not be cut further."""
        if whole.before:
            return self._together([whole])[0]
        ids: list[np.ndarray] = []
        held: list[Piece] = []
        try:
            for piece, _, last in self.pieces(slices(whole.text)):
                held.append(piece)
                if last or sum(len(piece.text) for piece in held) >= WHOLE:
                    for more in self._together(held):
                        if isinstance(more, InputError):
                            return more
                        ids.append(more)
                    held = []
        except InputError as error:
            return error
        return np.concatenate(ids)

    def _together(self, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of pieces that are read at once."""
        spelled = [any(hint in piece.before + piece.text for hint in self._hints)
                   and bool(self._added.search(piece.before + piece.text)) for piece in pieces]
        out: dict[int, np.ndarray | InputError] = {}
        for plain in (False, True):
            mine = [number for number in range(len(pieces)) if spelled[number] == plain]
            backend = self._bare if plain and mine else self._backend
            out |= zip(mine, self._batch(backend.encode_batch_fast, [pieces[number] for number in mine]), strict=True)
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
        """A long text in pieces that can be read one by one: (piece, whether it is the first, whether the last).

        Raises:
            InputError: It cannot be read in pieces.
        """
        return self._cutter.pieces(blocks, lambda text: self._bare if self._added.search(text) else self._backend)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._backend)

    def _plainly(self, text: str, start: int, stop: int) -> tuple[list[int], list[Span]]:
        """A section's ids with every spelled token read as text; behind an anchor, since it does not begin the text."""
        if start >= stop:
            return [], []
        anchor = ANCHOR if start else ""
        reading = self._run(self._plain, anchor + text[start:stop])
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

    # ---- the library -------------------------------------------------------------------------------------------------

    def _run(self, backend: Any, text: str) -> Reading:
        try:
            encoding = backend.encode(text, add_special_tokens=False)
        except TypeError:
            raise InputError(SURROGATE) from None
        except BaseException as error:
            raise panicked(error, self._source) from None
        return Reading(encoding.ids, encoding=encoding)

    def _batch(self, run: Any, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of each piece, what stands before it left out."""
        try:
            encodings = run([piece.before + piece.text for piece in pieces], add_special_tokens=False)
        except BaseException as error:
            reason = InputError(SURROGATE) if isinstance(error, TypeError) else panicked(error, self._source)
            if not isinstance(reason, InputError):
                raise
            if len(pieces) > 1:                         # one of them spoils the batch
                return [self._batch(run, [piece])[0] for piece in pieces]
            return [reason]
        return [np.array(encoding.ids, dtype=np.uint32)[piece.skip:]
                for encoding, piece in zip(encodings, pieces, strict=True)]


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the spellings, the longest first; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")
