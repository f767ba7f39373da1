r"""Encode rendered text: content never becomes a control token, and no token spans the start of an answer.

A text is encoded as a whole where the result satisfies both rules, and section by section otherwise:

    <|im_start|> user\n say <|im_end|> twice <|im_end|> \n <|im_start|> assistant\n | yes <|im_end|>
    ~control~~~~            ~~text~~~~       ~control~~    ~control~~~~             ^ seam

A text of more than `WHOLE` characters is tokenized in pieces with the same result (`cutting.py`), which bounds memory
at some tens of bytes per input byte.
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

# Private-use characters without a repeated part: a placeholder for the token before a section.
ANCHOR = "\U0010fffd\U0010f8ff\U0010fffc"
WHOLE = 1 << 18                                         # characters that the library tokenizes at once
HEADER = 1000                                           # characters of an answer's header that may be cached
SEAMS = 64                                              # more answers than this make the text count as longer
SURROGATE = "text contains a lone surrogate, which is not a character"
SPACES = re.compile(r"\s*")


class Encoder:
    """Exact tokenization of rendered text.

    Args:
        backend: A `tokenizers.Tokenizer`.
        source: Its folder, for error messages.
    """

    def __init__(self, backend: Any, source: str = "") -> None:
        self._backend, self._source = backend, source
        self._headers: dict[str, list[int]] = {}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._by_spelling = {token.content: (id_, token) for id_, token in added.items()}
        marks = [token for token in added.values() if token.content.strip()]    # runs of spaces are not control tokens
        self._added = _any_of(token.content for token in marks)
        self._hints = {token.content[:2] for token in marks}
        self._sayable = _any_of(token.content for token in added.values() if not token.special)

    def encode(self, rendered: Rendered, seams: Sequence[int] = ()) -> Reading | LongReading:
        """Encode a text as a whole; it is split at seams that a token would span.

        Raises:
            InputError: Content would still become a control token, the text contains a lone surrogate, or it is long
                and cannot be tokenized in pieces.
        """
        text, tokens = rendered.text, self._tokens(rendered)
        forged = [start for start, *_ in tokens] != [match.start() for match in self._added.finditer(text)]
        size = len(text) * max(1, len(seams) // SEAMS)      # each seam may need all the text before it
        reading = self._parted(text, tokens, size=size) if forged else self.whole(text, size)
        split_at = [seam for seam in seams if not self._clean_seam(text, seam, tokens, forged, reading)]
        if split_at:
            reading = self._parted(text, tokens, split_at, size=size)
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
        """(start, stop, id) of genuine added tokens: those of the template, and those in the assistant's content."""
        text, at = rendered.text, 0
        matches: list[re.Match[str]] = []
        spans = [*((*span, False) for span in rendered.literals), *((*span, True) for span in rendered.assistant_spans)]
        for start, stop, own in sorted([*spans, (len(text), len(text), False)]):
            matches += self._added.finditer(text, at, start)
            if own:
                matches += self._sayable.finditer(text, start, stop)
            at = stop
        tokens = []
        for match in matches:
            id_, token = self._by_spelling[match[0]]
            stop = match.end()
            if token.rstrip:                        # such a token includes the space after it
                stop = SPACES.match(text, stop).end()       # type: ignore[union-attr]
            tokens.append((match.start(), stop, id_))
        return tokens

    def _parted(self, text: str, tokens: Sequence[tuple[int, int, int]], seams: Sequence[int] = (),
                size: int = 0) -> Reading | LongReading:
        """Encode each section between genuine added tokens without added tokens, and split at the seams."""
        if size <= WHOLE:
            return Reading(*self._sections(text, tokens, seams), split_at=seams)
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
        """The same for a short text: all ids and their spans."""
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop, id_ in self._cuts(text, tokens, seams):
            more, spans = ([id_], [(start, stop)]) if id_ >= 0 else self._plainly(text, start, stop)
            ids += more
            offsets += spans
        return ids, offsets

    def _cuts(self, text: str, tokens: Sequence[tuple[int, int, int]],
              seams: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of genuine added tokens, and of the sections between them with id -1."""
        at = 0
        seams = sorted({*seams, *(match.start() + 1 for match in re.finditer(ANCHOR, text))})
        for start, stop, id_ in [*tokens, (len(text), len(text), -1)]:
            inside = seams[bisect_right(seams, at):bisect_left(seams, start)]
            yield from ((begin, end, -1) for begin, end in pairwise([at, *inside, start]) if begin < end)
            if id_ >= 0:
                yield start, stop, id_
            at = stop

    def _stretches(self, backend: object, text: str, start: int, stop: int, first: int = 0,
                   anchor: str = "") -> Iterator[tuple[Stretch, np.ndarray]]:
        """The pieces of a section of a long text, each with its ids."""
        at, run = start - len(anchor), partial(self._run, backend)
        for piece, *_ in self._cutter.pieces(slices(anchor + text[start:stop]), lambda _: backend):
            end = at + len(piece.text)
            before, skip = (anchor, int(bool(anchor))) if at < start else (piece.before, piece.skip)
            ids = np.array(run(piece.before + piece.text).ids[max(skip, piece.skip):], dtype=np.uint32)
            yield Stretch(max(at, start), end, first, before, skip, run), ids
            at, first = end, first + len(ids)

    def _clean_seam(self, text: str, at: int, tokens: Sequence[tuple[int, int, int]], forged: bool,
                    reading: Reading | LongReading) -> bool:
        """Whether the ids before `at` equal those of the prompt alone, as the server encodes it."""
        ids, count = reading.ids, reading.tokens_finished(at)
        section = max((stop for _, stop, _ in tokens if stop <= at), default=0)
        first = reading.tokens_finished(section)
        if count is None or first is None:
            return False
        header = text[section:at]                   # the same short text before every answer
        if not forged and len(header) <= HEADER:
            if header not in self._headers and len(self._headers) < 1000:
                self._headers[header] = self._run(self._backend, header).ids
            if self._headers.get(header) == [int(id_) for id_ in ids[first:count]]:
                return True                         # added tokens split the text, so the last section decides
        if isinstance(reading, LongReading):        # its stretches are tokenized independently
            return reading.is_prefix(at, count)
        if forged:
            return self._plainly(text, section, at)[0] == ids[first:count]
        return self._run(self._backend, text[:at]).ids == ids[:count]

    def whole(self, text: str, size: int = 0) -> Reading | LongReading:
        """Tokenize a text with the library, control tokens included; in pieces if `size` exceeds `WHOLE`."""
        if size <= WHOLE:
            return self._run(self._backend, text)
        stretches, ids = zip(*self._stretches(self._backend, text, 0, len(text)), strict=True)
        return LongReading(text, np.concatenate(ids), stretches)

    # ---- plain text --------------------------------------------------------------------------------------------------

    def texts(self, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of pieces of plain text as within their documents; spelled control tokens stay text."""
        if any(len(piece.text) > WHOLE for piece in pieces):
            return [self._in_pieces(piece) if len(piece.text) > WHOLE else self._together([piece])[0]
                    for piece in pieces]
        return self._together(pieces)

    def _in_pieces(self, whole: Piece) -> "np.ndarray | InputError":
        """The same for a long piece, some pieces at a time; pieces of a split text are never split again."""
        if whole.before:
            return self._together([whole])[0]
        ids: list[np.ndarray] = []
        batch: list[Piece] = []
        try:
            for piece, _, last in self.pieces(slices(whole.text)):
                batch.append(piece)
                if last or sum(len(piece.text) for piece in batch) >= WHOLE:
                    for more in self._together(batch):
                        if isinstance(more, InputError):
                            return more
                        ids.append(more)
                    batch = []
        except InputError as error:
            return error
        return np.concatenate(ids)

    def _together(self, pieces: Sequence[Piece]) -> list["np.ndarray | InputError"]:
        """Ids of pieces that are tokenized in one batch."""
        spelled = [any(hint in piece.before + piece.text for hint in self._hints)
                   and bool(self._added.search(piece.before + piece.text)) for piece in pieces]
        out: dict[int, np.ndarray | InputError] = {}
        for plain in (False, True):
            mine = [number for number in range(len(pieces)) if spelled[number] == plain]
            backend = self._bare if plain and mine else self._backend
            out |= zip(mine, self._batch(backend.encode_batch_fast, [pieces[number] for number in mine]), strict=True)
        arrays = [ids for ids in out.values() if isinstance(ids, np.ndarray)]
        if arrays and np.isin(np.concatenate(arrays), self._specials).any():        # one test for all, since it is rare
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
        """Pieces of a long text that can be tokenized separately: (piece, is the first, is the last).

        Raises:
            InputError: The text cannot be tokenized in pieces.
        """
        return self._cutter.pieces(blocks, lambda text: self._bare if self._added.search(text) else self._backend)

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._backend)

    def _plainly(self, text: str, start: int, stop: int) -> tuple[list[int], list[Span]]:
        """Ids of a section with every spelled token as text; after an anchor unless it begins the text."""
        if start >= stop:
            return [], []
        anchor = ANCHOR if start else ""
        reading = self._run(self._plain, anchor + text[start:stop])
        shift, skip = start - len(anchor), int(bool(anchor))
        return reading.ids[skip:], [(shift + a, shift + b) for a, b in reading.spans[skip:]]

    @cached_property
    def _bare(self) -> Any:
        """The same vocabulary and rules without added tokens; built when a text first spells one."""
        rules = json.loads(self._backend.to_str())
        rules["added_tokens"] = [token for token in rules["added_tokens"] if not token["content"].strip()]
        return type(self._backend).from_str(json.dumps(rules))

    @cached_property
    def _plain(self) -> Any:
        """The same with the anchor, an id outside the model, for sections split at every spelled anchor."""
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
        """Ids of each piece without its context."""
        try:
            encodings = run([piece.before + piece.text for piece in pieces], add_special_tokens=False)
        except BaseException as error:
            reason = InputError(SURROGATE) if isinstance(error, TypeError) else panicked(error, self._source)
            if not isinstance(reason, InputError):
                raise
            if len(pieces) > 1:                         # one failing piece fails the whole batch
                return [self._batch(run, [piece])[0] for piece in pieces]
            return [reason]
        return [np.array(encoding.ids, dtype=np.uint32)[piece.skip:]
                for encoding, piece in zip(encodings, pieces, strict=True)]


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the spellings, the longest first; without spellings it matches nothing."""
    return re.compile("|".join(map(re.escape, sorted(spellings, key=len, reverse=True))) or r"(?!)")
