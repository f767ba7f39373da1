"""Encode the records of a source into blocks of tokens, for the store on disk (`prepare.py`) and for streams alike.

A record is a line or an object from `records/`; a block has the arrays of a batch of records. An error in one record
becomes a value in the block, so that the caller decides whether to stop or to set the record aside.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lit_llm.data.records import formats
from lit_llm.data.records.cleaning import clean_blocks, cleaned
from lit_llm.data.records.jsonfile import parse_line
from lit_llm.data.records.record import LongText, Place, Record, size_of_value
from lit_llm.data.records.sources import Source
from lit_llm.errors import GivenUpError, InputError
from lit_llm.text.conversation import Conversation, Document
from lit_llm.text.cutting import Piece, UncutError
from lit_llm.text.tokenizer import IGNORE_INDEX, SPEAKERS, Tokenizer, TokenSequence, TrainOn

OnBadRecord = Literal["error", "quarantine"]
CONVERSATION, DOCUMENT = 0, 1
DOCUMENTS = np.array([SPEAKERS.index("document")], dtype=np.uint8)
SEQUENCE = np.dtype([
    ("offset", "<i8"), ("length", "<i4"), ("supervised", "<i4"),    # supervised: beyond the first token
    ("kind", "u1"), ("ended", "u1"),                                # ended: its last token is the end-of-text token
    ("file", "<i4"), ("number", "<i8"),                             # place of its record, for messages
    ("content", "<u8"), ("record", "<i8")])                         # content: a hash, equal for equal records


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a long document, or the error that ends it."""

    piece: Piece | InputError
    first: bool
    last: bool

    @property
    def is_broken(self) -> bool:
        """Whether the rest of its document cannot be read."""
        return isinstance(self.piece, InputError)


Item = tuple[Record | Part | InputError, Place]
MOST_SKIPPED = 1 << 30                                  # characters of a document that may be skipped


def size_of(record: object) -> int:
    """Approximate number of characters of a record."""
    if isinstance(record, Part):
        return len(record.piece.text) if isinstance(record.piece, Piece) else 0
    return size_of_value(record)


def begins_record(record: object) -> bool:
    """Whether this item begins a record, or a long document in parts."""
    return not isinstance(record, Part) or record.first


@dataclass(frozen=True, slots=True)
class Encoded:
    """The sequences of a record; none, with the reason in `dropped`, if it is empty.

    Args:
        kind: CONVERSATION or DOCUMENT.
        content: Hash of its content.
        sequences: Its token sequences.
        dropped: The reason why it is left out.
        first: Whether its sequence begins here; parts of a long document are consecutive.
        last: Whether it ends here.
    """

    kind: int
    content: int
    sequences: tuple[TokenSequence, ...]
    dropped: str = ""
    first: bool = True
    last: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """A batch of records as arrays that can be appended to a store, and cheaply sent between processes.

    Args:
        tokens: Tokens of all its sequences.
        marks: (tokens,) uint8, as in marks.bin.
        rows: (S,) SEQUENCE; offsets are relative to the block, `number` is the record's index in the batch.
        faults: (index in the batch, reason why it is left out): an error, or a reason to drop it.
        unbroken: (S, 2) bool, whether a sequence begins and ends here; null if all do.
        stopless: Conversations without a supervised stop token.
        double_bos: Sequences that begin with two BOS tokens.
        cleaned: Records whose white space was cleaned.
        notes: Other notes, such as unused keys -> number of records.
    """

    tokens: np.ndarray
    marks: np.ndarray
    rows: np.ndarray
    faults: list[tuple[int, InputError | str]]
    unbroken: np.ndarray | None
    stopless: int
    double_bos: int
    cleaned: int
    notes: dict[str, int]


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest dtype for all token ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def to_block(encoded: Sequence[Encoded | InputError], tokenizer: Tokenizer, *, cleaned: int = 0,
          notes: dict[str, int] | None = None) -> Block:
    """The arrays of a batch of encoded records."""
    faults: list[tuple[int, InputError | str]] = []
    rows: list[tuple[int, ...]] = []
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    speakers: list[np.ndarray] = []
    flags: list[tuple[bool, bool]] = []
    offset = 0
    for number, record in enumerate(encoded):
        if isinstance(record, InputError) or record.dropped:
            faults.append((number, record if isinstance(record, InputError) else record.dropped))
            continue
        for sequence in record.sequences:
            ended = record.kind == DOCUMENT and record.last and sequence.input_ids[-1] == tokenizer.eos_id
            rows.append((offset, len(sequence), 0, record.kind, ended, 0, number, record.content, 0))
            ids.append(sequence.input_ids)
            labels.append(sequence.labels)
            speakers.append(DOCUMENTS.repeat(len(sequence)) if sequence.speakers is None else sequence.speakers)
            flags.append((record.first, record.last))
            offset += len(sequence)
    table = np.array(rows, dtype=SEQUENCE)
    mask = (np.concatenate(labels) != IGNORE_INDEX) if labels else np.zeros(0, dtype=bool)
    tokens = np.concatenate([*ids, np.zeros(0, dtype=np.int32)]).astype(token_dtype(tokenizer))
    stopless = double_bos = 0
    if rows:
        firsts = mask[table["offset"]] & [first for first, _ in flags]  # a sequence's first token is never predicted
        table["supervised"] = np.add.reduceat(mask, table["offset"], dtype=np.int64) - firsts
        stops = np.add.reduceat(mask & np.isin(tokens, tokenizer.stop_ids), table["offset"], dtype=np.int64)
        stopless = int(((stops == 0) & (table["kind"] == CONVERSATION)).sum())
        begins = table["offset"][(table["length"] > 1) & [first for first, _ in flags]]
        double_bos = int(((tokens[begins] == tokenizer.bos_id) & (tokens[begins + 1] == tokenizer.bos_id)).sum())
    marks = mask.view(np.uint8) | (np.concatenate(speakers) << 1 if speakers else mask.view(np.uint8))
    whole = all(first and last for first, last in flags)
    unbroken = None if whole else np.array(flags)
    return Block(tokens, marks, table, faults, unbroken, stopless, double_bos, cleaned, notes or {})


class SourceEncoder:
    """Encodes the records of one source. It contains only settings, so it can be sent to other processes.

    Args:
        source: The source.
        tokenizer: The tokenizer.
        train_on: Which tokens of a conversation are supervised.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, train_on: TrainOn = "assistant") -> None:
        self.source, self.tokenizer, self.train_on = source, tokenizer, train_on
        self._format = formats.FORMATS.get(source.format)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register a user's format in a spawned process, where it is not registered yet."""
        vars(self).update(state)
        if self._format is not None:
            formats.FORMATS.setdefault(self.source.format, self._format)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[Item]:
        """Yield records with their places, JSON lines unparsed, and long documents in parts."""
        for record, place in self.source.scan(parse=False):
            if not isinstance(record, LongText):
                yield record, place
                continue
            size, done = max(Path(place.path).stat().st_size, 1), 0
            try:
                for part in self.parts_of(record):
                    if isinstance(part.piece, Piece):
                        done += len(part.piece.text.encode("utf-8", "surrogatepass"))
                    yield part, replace(place, share=min(place.share + done / size, 1))
            except InputError as error:
                raise error.at(str(place)) from None

    def parts_of(self, record: LongText) -> Iterator[Part]:
        """Yield the parts of a long document; the last one is an error if reading failed."""
        first = True
        try:
            for piece, _, last in self.tokenizer.pieces(clean_blocks(record.blocks, self.source.clean)):
                yield Part(piece, first, last)
                first = False
        except UncutError as error:
            yield Part(error, first, True)
            left = MOST_SKIPPED                         # skip the rest of the document to reach the next record
            for block in record.blocks:
                left -= len(block)
                if left < 0:
                    raise InputError(f"{error.what}; the {MOST_SKIPPED:,} characters after it belong to the same "
                                     "document", fix=error.fix) from None

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def block(self, items: list[Item]) -> Block:
        """Encode a batch of records as arrays."""
        encoded, changed, notes = self.encode(items)
        return to_block(encoded, self.tokenizer, cleaned=changed, notes=notes)

    def encode(self, items: list[Item]) -> tuple[list[Encoded | InputError], int, dict[str, int]]:
        """Encode records.

        Args:
            items: Records with their places.

        Returns:
            The tokens or the error of each record; the number of cleaned records; notes -> number of records.
        """
        changed, noted = 0, Counter[str]()
        out: list[Encoded | InputError | None] = []     # None: a document, filled in below
        texts: list[Piece] = []                         # documents are tokenized together
        for record, place in items:
            try:
                notes: set[str] = set()
                content, was_cleaned = self._content(record, place, notes)
                noted.update(notes)
                changed += was_cleaned
                if isinstance(content, Conversation):
                    notes = set()
                    out.append(self._conversation(content, notes))
                    noted.update(notes)
                else:
                    texts.append(content)
                    out.append(None)
            except GivenUpError:
                raise
            except InputError as error:
                out.append(error)
        ids = iter(zip(texts, self.tokenizer.encode_pieces(texts), strict=True))
        every = [self._document(*next(ids), record) if encoded is None else encoded
                 for encoded, (record, _) in zip(out, items, strict=True)]
        return [one.at(str(place)) if isinstance(one, InputError) else one
                for one, (_, place) in zip(every, items, strict=True)], changed, noted

    def _content(self, record: Any, place: Place, notes: set[str]) -> tuple[Piece | Conversation, bool]:
        """The content of a record, and whether its white space was cleaned."""
        if isinstance(record, Part):
            record = record.piece
        elif isinstance(record, bytes):
            record = parse_line(record, Path(place.path), place.number)
        if isinstance(record, InputError):
            raise record
        if isinstance(record, Piece):
            return record, False
        read = formats.convert(record, format=self.source.format, columns=self.source.columns, notes=notes)
        content = cleaned(read, self.source.clean)
        return Piece("", content.text) if isinstance(content, Document) else content, content is not read

    def _document(self, piece: Piece, ids: Any, record: Any) -> Encoded | InputError:
        first, last = (record.first, record.last) if isinstance(record, Part) else (True, True)
        content = _hash(piece.text)
        if isinstance(ids, InputError):
            return ids
        if first and last and not piece.text.strip():
            return Encoded(DOCUMENT, content, (), "the text is empty")
        array = self.tokenizer.framed(ids, first=first, last=last)
        return Encoded(DOCUMENT, content, (TokenSequence(array, array),), first=first, last=last)

    def _conversation(self, conversation: Conversation, notes: set[str]) -> Encoded:
        try:
            args = conversation.template_args
            whole = [conversation.to_openai(), list(conversation.tools), *([args] if args else [])]
            text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:  # from tables, whose values may be dates or bytes
            raise InputError(f"tools or tool calls contain a value that JSON cannot represent: {error}") from None
        encoded = self.tokenizer.encode_conversation(conversation, train_on=self.train_on, notes=notes)
        if not all((sequence.labels[1:] != IGNORE_INDEX).any() for sequence in encoded):
            raise InputError("no token of this conversation is supervised, so there is nothing to train on")
        return Encoded(CONVERSATION, _hash(text), tuple(encoded))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
