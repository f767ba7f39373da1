"""Tokenize and pack a stream of records chunk by chunk; memory contains one or two chunks, never the corpus.

A chunk is some megabytes of text that are tokenized, packed and shuffled together. All processes read all records,
which is cheap; each tokenizes its share of a chunk, and they exchange the tokens. So each process knows every packed
sequence, none depends on the number of processes, and the position of a stream is the same on all.
"""

import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lit_llm.data.records.jsonfile import parse_line
from lit_llm.data.records.record import Place
from lit_llm.data.rows import packing as pack
from lit_llm.data.rows.corpus import Corpus
from lit_llm.data.rows.packing import Overlong, Packing, Rows
from lit_llm.data.stream.feed import Cursor, Feed
from lit_llm.data.stream.memory import Memory, joined
from lit_llm.data.tokens.encode import (
    CONVERSATION,
    Block,
    Encoded,
    Item,
    OnBadRecord,
    Part,
    SourceEncoder,
    begins_record,
    size_of,
    to_block,
    token_dtype,
)
from lit_llm.data.tokens.workers import Workers
from lit_llm.errors import InputError

BLOCK_RECORDS, BLOCK_CHARACTERS = 256, 1 << 17          # limits of a block
JUDGED = 1000  # records of a source after which its share of bad ones is checked
QUARANTINE = 16 << 20                                   # bytes of set-aside records that are stored
Share = Callable[[Any], list[Any]]                      # exchanges a value of each process with all


@dataclass(frozen=True, slots=True)
class Position:
    """The start of a chunk: everything that is needed to rebuild it and what follows.

    Args:
        number: Number of chunks before it.
        cursors: The next record of each source.
        accepted: Records of each source that became tokens.
        bad: Records of each source that were set aside.
        remainder: Remainder of the previous chunk: less than a packed sequence.
    """

    number: int
    cursors: tuple[Cursor, ...]
    accepted: tuple[int, ...]
    bad: tuple[int, ...]
    remainder: Memory


@dataclass(frozen=True, slots=True)
class Chunk:
    """Packed sequences that were packed and shuffled together.

    Args:
        begin: Its start.
        memory: Its sequences.
        corpus: The sequences as a corpus for the loader.
        rows: The packed sequences, with their supervised tokens counted.
        order: Their numbers, shuffled.
        counts: (S, 4): for each segment its source, whether a sequence begins with it, tokens, supervised tokens.
    """

    begin: Position
    memory: Memory
    corpus: Corpus
    rows: Rows
    order: np.ndarray
    counts: np.ndarray


@dataclass(slots=True)
class _Read:
    """The records read for one chunk in blocks, and pending tokens of this process's blocks."""

    blocks: list[list[tuple[int, Item]]] = field(default_factory=list)
    mine: list[Callable[[], Block]] = field(default_factory=list)
    cursors: tuple[Cursor, ...] = ()                    # positions after it
    error: InputError | None = None                     # error that ends it, raised when its turn comes


class Stream:
    """Chunks of packed sequences from several sources, a function of the arguments up to `bad_record_limit`.

    Args:
        encoders: Encoders of the sources, with the same tokenizer and `train_on`.
        seq_len: Tokens per packed sequence.
        packing: Packing policy within a chunk.
        overlong: What to do with conversations longer than `seq_len`.
        seed: Seed of the order.
        buffer: Characters per chunk.
        on_bad_record: Whether to stop or to set records aside.
        bad_record_limit: Maximum share of a source's records that may be set aside.
        quarantine: File for records set aside; written by process 0.
        rank: This process, of `world`.
        world: Number of processes that share the work.
        share: Exchanges a value between processes; null lets each do all the work.
        num_proc: Tokenizing processes of this process; 1 is this process.
        fingerprint: Fingerprint of data and settings, which must be equal on all processes.
    """

    def __init__(self, encoders: Sequence[SourceEncoder], *, seq_len: int, packing: Packing, overlong: Overlong,
                 seed: int, buffer: int, on_bad_record: OnBadRecord = "error", bad_record_limit: float = 0.1,
                 quarantine: Path | None = None, rank: int = 0, world: int = 1, share: Share | None = None,
                 num_proc: int = 1, fingerprint: str = "") -> None:
        self.encoders = encoders
        self.seq_len, self.packing, self.overlong, self.seed, self.buffer = seq_len, packing, overlong, seed, buffer
        self.on_bad_record, self.bad_record_limit, self.quarantine = on_bad_record, bad_record_limit, quarantine
        self.share, self.num_proc, self.fingerprint = share, num_proc, fingerprint
        self.is_first = rank == 0
        self.rank, self.world = (rank, world) if share else (0, 1)
        self.notes: dict[str, int] = {}                 # what this process cut or dropped
        self._dtype = token_dtype(encoders[0].tokenizer)

    @property
    def paths(self) -> list[str]:
        """Paths of the sources."""
        return [encoder.source.path for encoder in self.encoders]

    @property
    def beginning(self) -> Position:
        """Position of the first chunk."""
        none = (0,) * len(self.encoders)
        return Position(0, (Cursor(),) * len(none), none, none, Memory.empty(self._dtype))

    def chunks(self, begin: Position) -> Generator[Chunk, None, None]:
        """Yield chunks endlessly from a position; with worker processes the next one is tokenized in advance.

        Raises:
            InputError: A bad record, too many of them, or a pass without supervised tokens; raised on all processes.
        """
        feed = Feed(self.encoders, seed=self.seed, cursors=begin.cursors)
        items, position, written = iter(feed), begin, begin.number     # records of rebuilt chunks were already written
        work = partial(_to_block, encoders=self.encoders)
        ahead: deque[_Read] = deque()
        with closing(Workers(work, self.num_proc)) as workers:
            while True:
                while len(ahead) < (1 if self.num_proc == 1 else 2) and not (ahead and ahead[-1].error):
                    ahead.append(self._read(feed, items, workers))
                read = ahead.popleft()
                blocks = self._exchanged(read)
                after = self._judged(read, blocks, position, write=position.number > written or not position.number)
                chunk, remainder = self._packed(position, joined(position.remainder, read.blocks, blocks))
                position = Position(position.number + 1, read.cursors, *after, remainder)
                if len(chunk.rows):
                    begin = position
                    yield chunk
                elif all(new.turn > old.turn + 1 for new, old in zip(read.cursors, begin.cursors, strict=True)):
                    raise InputError("no sequence can be trained on: each is too long or has no supervised token",
                                     where="data.sources", fix="Look at data.seq_len, data.overlong and "
                                     "data.train_on.")

    # ---- records to blocks -------------------------------------------------------------------------------------------

    def _read(self, feed: Feed, items: Iterator[tuple[int, Item]], workers: Workers) -> _Read:
        """Read the records of a chunk, and start tokenizing this process's share."""
        read, total = _Read(), 0
        while total < self.buffer and not read.error:
            batch: list[tuple[int, Item]] = []
            characters = 0
            try:
                while len(batch) < BLOCK_RECORDS and characters < BLOCK_CHARACTERS and total < self.buffer:
                    batch.append(next(items))
                    size = 1 + size_of(batch[-1][1][0])
                    characters, total = characters + size, total + size
            except InputError as error:
                read.error = error
            if len(read.blocks) % self.world == self.rank:
                read.mine.append(workers.submit(batch))
            read.blocks.append(batch)
        read.cursors = tuple(feed.cursors)
        return read

    def _exchanged(self, read: _Read) -> list[Block]:
        """The blocks of all processes in order; an error of one is raised in all."""
        mine: list[Block] = []
        failed = read.error
        try:
            mine = [later() for later in read.mine]
        except InputError as reason:
            failed = reason
        except Exception as reason:
            if self.share:                              # the others must not wait for this process
                self.share((self.fingerprint, mine, InputError(f"process {self.rank} failed: {reason!r}")))
            raise
        message = (self.fingerprint, mine, failed)
        messages = self.share(message) if self.share else [message]
        for rank, (fingerprint, _, error) in enumerate(messages):
            if error:
                raise error
            if fingerprint != self.fingerprint:
                raise InputError(f"process {rank} has other data than process {self.rank}", where="data.sources",
                                 fix="Use the same files and settings on all machines.")
        return [messages[number % self.world][1][number // self.world] for number in range(len(read.blocks))]

    # ---- reports -----------------------------------------------------------------------------------------------------

    def _judged(self, read: _Read, blocks: Sequence[Block], position: Position,
                *, write: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Records of each source kept and set aside so far."""
        accepted, bad = list(position.accepted), list(position.bad)
        reasons: dict[int, str] = {}
        for batch, done in zip(read.blocks, blocks, strict=True):
            for number, (record, _) in batch:
                accepted[number] += begins_record(record)
            for at, reason in done.faults:
                number, (record, place) = batch[at]
                accepted[number] -= begins_record(record)
                reasons[number] = reason.what if isinstance(reason, InputError) else reason
                if isinstance(reason, InputError):
                    bad[number] += 1
                    if self.on_bad_record == "error":
                        raise reason.at(str(place))
                    if write and not position.cursors[number].turn:
                        self._set_aside(reason.at(str(place)), record, place)
        for number, cursor in enumerate(read.cursors):
            if not accepted[number] and cursor.turn:
                raise InputError(f"no record of {cursor.drawn:,} could be kept: {reasons.get(number, 'see above')}",
                                 where=self.paths[number])
            if bad[number] > self.bad_record_limit * cursor.drawn and (cursor.turn or cursor.drawn >= JUDGED):
                raise InputError(f"{bad[number]:,} of {cursor.drawn:,} records are bad, more than "
                                 "data.bad_record_limit allows", where=self.paths[number],
                                 fix=f"They are in {self.quarantine}, each with its reason; fix them, or raise the "
                                 "limit.")
        return tuple(accepted), tuple(bad)

    def _set_aside(self, error: InputError, record: Any, place: Place) -> None:
        file = self.quarantine
        if not self.is_first or file is None or (file.exists() and file.stat().st_size > QUARANTINE):
            return
        line = {"where": error.where, "reason": error.what}
        record = parse_line(record, Path(place.path), place.number) if isinstance(record, bytes) else record
        if not isinstance(record, InputError | Part):
            line["record"] = record
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(line, ensure_ascii=False, default=str)[:QUARANTINE] + "\n")

    # ---- packing -----------------------------------------------------------------------------------------------------

    def _packed(self, begin: Position, memory: Memory) -> tuple[Chunk, Memory]:
        """Pack the sequences of a chunk; also returns the remainder for the next one."""
        lengths, is_document = memory.sequences["length"].astype(np.int64), memory.sequences["kind"] != CONVERSATION
        if self.packing == "concat":
            if self.encoders[0].train_on != "all" and not is_document.all():
                raise pack.CONCAT.error(where=memory.place(int(np.flatnonzero(~is_document)[0])))
            segments = pack.whole(lengths)
        else:
            segments, remainder = self._split(memory, lengths, is_document)
        corpus = Corpus([(memory, np.arange(len(lengths)))])
        if self.packing != "concat":
            is_supervised = corpus.count(segments) > 0
            self._note("dropped_nothing_left", int((~is_supervised).sum()))
            segments = segments[is_supervised]
        rows = pack.pack(segments, seq_len=self.seq_len, packing=self.packing)
        if self.packing == "concat":
            rows, remainder = _whole_rows(rows, memory, self.seq_len)
        of = rows.segments
        counts = np.stack([memory.source[of.sequence], memory.begins[of.sequence] & (of.start == 0), of.lengths,
                           corpus.count(of)], axis=1).astype(np.int64)
        order = np.random.default_rng([self.seed, begin.number]).permutation(len(rows))
        return Chunk(begin, memory, corpus, rows.counted(counts[:, 3]), order, counts), remainder

    def _split(self, memory: Memory, lengths: np.ndarray, is_document: np.ndarray) -> tuple[pack.Segments, Memory]:
        """Segments of at most `seq_len` tokens; of an unfinished document only full windows."""
        last, stride = len(lengths) - 1, self.seq_len - 1
        remainder = Memory.empty(self._dtype)
        if memory.open:
            full = (int(lengths[last]) - 1) // stride
            rest = pack.Segments(*(np.array([value]) for value in (last, full * stride, lengths[last])))
            remainder = memory.taken(rest, open=True)
            lengths = np.append(lengths[:last], full * stride + 1)
        try:
            split = pack.split(lengths, is_document, seq_len=self.seq_len, overlong=self.overlong)
        except InputError as error:
            raise InputError(error.what, where=memory.place(int(error.where)), fix=error.fix) from None
        self._note("cut", len(split.cut))
        self._note("dropped_overlong", len(split.dropped))
        segments = split.segments
        return segments[(segments.sequence != last) | (segments.lengths > 1)] if memory.open else segments, remainder

    def _note(self, what: str, count: int) -> None:
        self.notes[what] = self.notes.get(what, 0) + count


def _to_block(batch: list[tuple[int, Item]], *, encoders: Sequence[SourceEncoder]) -> Block:
    """Encode records of several sources, in order."""
    out: list[Encoded | InputError | None] = [None] * len(batch)
    for number in {number for number, _ in batch}:
        which = [at for at, (other, _) in enumerate(batch) if other == number]
        done = encoders[number].encode([batch[at][1] for at in which])
        for at, one in zip(which, done[0], strict=True):
            out[at] = one
    return to_block([one for one in out if one is not None], encoders[0].tokenizer)


def _whole_rows(rows: Rows, memory: Memory, seq_len: int) -> tuple[Rows, Memory]:
    """The full packed sequences of `concat`, and the segments of an incomplete last one."""
    lengths = rows.lengths
    full = len(rows) - int(len(rows) > 0 and lengths[-1] < seq_len)
    first = int(rows.offsets[full])
    rest = rows.segments[np.arange(first, len(rows.segments))]
    whole_rows = Rows(rows.segments[np.arange(first)], rows.offsets[:full + 1], rows.supervised[:full],
                      rows.segment_supervised[:first])
    return whole_rows, memory.taken(rest, open=memory.open and len(rest) > 0)
