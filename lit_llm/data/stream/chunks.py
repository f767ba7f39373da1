"""Tokenize and pack a stream of records chunk by chunk; memory holds one or two chunks, never the corpus.

A chunk is some megabytes of text that are tokenized, packed and shuffled together. All processes read all records,
which is cheap, each tokenizes its share of a chunk, and they exchange the tokens; so each knows every row, no row
depends on the number of processes, and where a stream stands is the same on all.
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

BLOCK_RECORDS, BLOCK_CHARACTERS = 256, 1 << 17          # what one call tokenizes, whichever comes first
JUDGED = 1000                                           # records of a source before its share of bad ones counts
QUARANTINE = 16 << 20                                   # bytes of records set aside that are kept
Share = Callable[[Any], list[Any]]                      # a value of each process, to all of them


@dataclass(frozen=True, slots=True)
class Position:
    """Where a chunk begins: all that is needed to make it and what follows it again.

    Args:
        number: Chunks before it.
        cursors: The next record of each source.
        kept: Records of each source that became tokens.
        bad: Records of each source that were set aside.
        held: What is left over of the chunk before it: less than a row of tokens.
    """

    number: int
    cursors: tuple[Cursor, ...]
    kept: tuple[int, ...]
    bad: tuple[int, ...]
    held: Memory


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are packed and shuffled together.

    Args:
        begin: Where it begins.
        memory: Its sequences.
        corpus: The same for the loader.
        rows: With their supervised tokens counted.
        order: The rows' numbers, shuffled.
        counts: (S, 4): of each segment its source, whether a sequence begins with it, tokens, supervised tokens.
    """

    begin: Position
    memory: Memory
    corpus: Corpus
    rows: Rows
    order: np.ndarray
    counts: np.ndarray


@dataclass(slots=True)
class _Read:
    """What was read for one chunk: its records in blocks, and the tokens of those that are this process's, on order."""

    blocks: list[list[tuple[int, Item]]] = field(default_factory=list)
    mine: list[Callable[[], Block]] = field(default_factory=list)
    cursors: tuple[Cursor, ...] = ()                    # behind it
    error: InputError | None = None                     # why it ends here, to be told when its turn comes


class Stream:
    """Chunks of rows of several sources; which, is a function of the arguments up to `bad_record_limit` alone.

    Args:
        encoders: Of the sources, with one tokenizer and one `train_on`.
        seq_len: Tokens of a row.
        packing: How rows are filled, within a chunk.
        overlong: What becomes of a conversation longer than a row.
        seed: Of the order.
        buffer: Characters of a chunk.
        on_bad_record: Stop, or set aside.
        bad_record_limit: Share of a source's records that may be set aside.
        quarantine: The file for them; written by process 0.
        rank: This process, of `world`.
        world: Processes that divide the work.
        share: Exchanges a value between them; null lets each do all the work.
        num_proc: Processes that tokenize for this one; 1 is this one itself.
        fingerprint: Of data and settings; all processes must have the same.
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
        self.notes: dict[str, int] = {}                 # what this process saw cut or dropped
        self._dtype = token_dtype(encoders[0].tokenizer)

    @property
    def paths(self) -> list[str]:
        """Of the sources."""
        return [encoder.source.path for encoder in self.encoders]

    @property
    def beginning(self) -> Position:
        """Of the first chunk."""
        none = (0,) * len(self.encoders)
        return Position(0, (Cursor(),) * len(none), none, none, Memory.empty(self._dtype))

    def chunks(self, begin: Position) -> Generator[Chunk, None, None]:
        """Endless chunks from a position on; with other processes the next one is tokenized while one is used.

        Raises:
            InputError: A bad record, too many of them, or a whole pass without anything to learn; on all processes.
        """
        feed = Feed(self.encoders, seed=self.seed, cursors=begin.cursors)
        items, position, written = iter(feed), begin, begin.number     # what is made again was written before
        work = partial(_to_block, encoders=self.encoders)
        ahead: deque[_Read] = deque()
        with closing(Workers(work, self.num_proc)) as workers:
            while True:
                while len(ahead) < (1 if self.num_proc == 1 else 2) and not (ahead and ahead[-1].error):
                    ahead.append(self._read(feed, items, workers))
                read = ahead.popleft()
                blocks = self._exchanged(read)
                after = self._judged(read, blocks, position, write=position.number > written or not position.number)
                chunk, held = self._packed(position, joined(position.held, read.blocks, blocks))
                position = Position(position.number + 1, read.cursors, *after, held)
                if len(chunk.rows):
                    begin = position
                    yield chunk
                elif all(new.turn > old.turn + 1 for new, old in zip(read.cursors, begin.cursors, strict=True)):
                    raise InputError("nothing in it can be learned: every sequence is too long, or no token of it is "
                                     "supervised", where="data.sources", fix="Look at data.seq_len, data.overlong and "
                                     "data.train_on.")

    # ---- records to blocks -------------------------------------------------------------------------------------------

    def _read(self, feed: Feed, items: Iterator[tuple[int, Item]], workers: Workers) -> _Read:
        """Records of a chunk, those of this process under way to become tokens."""
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
        """The blocks of all processes, in order; what is wrong in one of them is raised in all."""
        mine: list[Block] = []
        failed = read.error
        try:
            mine = [later() for later in read.mine]
        except InputError as reason:
            failed = reason
        except Exception as reason:
            if self.share:                              # the others must not wait for this one
                self.share((self.fingerprint, mine, InputError(f"process {self.rank} failed: {reason!r}")))
            raise
        said = (self.fingerprint, mine, failed)
        every = self.share(said) if self.share else [said]
        for rank, (fingerprint, _, error) in enumerate(every):
            if error:
                raise error
            if fingerprint != self.fingerprint:
                raise InputError(f"process {rank} sees other data than process {self.rank}", where="data.sources",
                                 fix="Give all machines the same files and settings.")
        return [every[number % self.world][1][number // self.world] for number in range(len(read.blocks))]

    # ---- what became of records --------------------------------------------------------------------------------------

    def _judged(self, read: _Read, blocks: Sequence[Block], position: Position,
                *, write: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Records of each source kept and set aside so far."""
        kept, bad = list(position.kept), list(position.bad)
        reasons: dict[int, str] = {}
        for batch, done in zip(read.blocks, blocks, strict=True):
            for number, (record, _) in batch:
                kept[number] += begins_record(record)
            for at, reason in done.faults:
                number, (record, place) = batch[at]
                kept[number] -= begins_record(record)
                reasons[number] = reason.what if isinstance(reason, InputError) else reason
                if isinstance(reason, InputError):
                    bad[number] += 1
                    if self.on_bad_record == "error":
                        raise reason.at(str(place))
                    if write and not position.cursors[number].turn:
                        self._set_aside(reason.at(str(place)), record, place)
        for number, cursor in enumerate(read.cursors):
            if not kept[number] and cursor.turn:
                raise InputError(f"no record of {cursor.drawn:,} could be kept: {reasons.get(number, 'see above')}",
                                 where=self.paths[number])
            if bad[number] > self.bad_record_limit * cursor.drawn and (cursor.turn or cursor.drawn >= JUDGED):
                raise InputError(f"{bad[number]:,} of {cursor.drawn:,} records are bad, more than "
                                 "data.bad_record_limit allows", where=self.paths[number],
                                 fix=f"They are in {self.quarantine}, each with its reason; mend them, or raise the "
                                 "limit.")
        return tuple(kept), tuple(bad)

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

    # ---- sequences to rows -------------------------------------------------------------------------------------------

    def _packed(self, begin: Position, memory: Memory) -> tuple[Chunk, Memory]:
        """The rows of a chunk, and what is left for the next one."""
        lengths, is_document = memory.sequences["length"].astype(np.int64), memory.sequences["kind"] != CONVERSATION
        if self.packing == "concat":
            if self.encoders[0].train_on != "all" and not is_document.all():
                raise pack.CONCAT.error(where=memory.place(int(np.flatnonzero(~is_document)[0])))
            segments = pack.whole(lengths)
        else:
            segments, held = self._split(memory, lengths, is_document)
        corpus = Corpus([(memory, np.arange(len(lengths)))])
        if self.packing != "concat":
            learned = corpus.count(segments) > 0
            self._note("dropped_nothing_left", int((~learned).sum()))
            segments = segments[learned]
        rows = pack.pack(segments, seq_len=self.seq_len, packing=self.packing)
        if self.packing == "concat":
            rows, held = _whole_rows(rows, memory, self.seq_len)
        of = rows.segments
        counts = np.stack([memory.source[of.sequence], memory.begins[of.sequence] & (of.start == 0), of.lengths,
                           corpus.count(of)], axis=1).astype(np.int64)
        order = np.random.default_rng([self.seed, begin.number]).permutation(len(rows))
        return Chunk(begin, memory, corpus, rows.counted(counts[:, 3]), order, counts), held

    def _split(self, memory: Memory, lengths: np.ndarray, is_document: np.ndarray) -> tuple[pack.Segments, Memory]:
        """Segments of at most a row; of a document that goes on, the windows that are full."""
        last, stride = len(lengths) - 1, self.seq_len - 1
        held = Memory.empty(self._dtype)
        if memory.open:
            full = (int(lengths[last]) - 1) // stride
            rest = pack.Segments(*(np.array([value]) for value in (last, full * stride, lengths[last])))
            held = memory.taken(rest, open=True)
            lengths = np.append(lengths[:last], full * stride + 1)
        try:
            split = pack.split(lengths, is_document, seq_len=self.seq_len, overlong=self.overlong)
        except InputError as error:
            raise InputError(error.what, where=memory.place(int(error.where)), fix=error.fix) from None
        self._note("cut", len(split.cut))
        self._note("dropped_overlong", len(split.dropped))
        segments = split.segments
        return segments[(segments.sequence != last) | (segments.lengths > 1)] if memory.open else segments, held

    def _note(self, what: str, count: int) -> None:
        self.notes[what] = self.notes.get(what, 0) + count


def _to_block(batch: list[tuple[int, Item]], *, encoders: Sequence[SourceEncoder]) -> Block:
    """Tokens of records of several sources, in their order."""
    out: list[Encoded | InputError | None] = [None] * len(batch)
    for number in {number for number, _ in batch}:
        which = [at for at, (other, _) in enumerate(batch) if other == number]
        done = encoders[number].encode([batch[at][1] for at in which])
        for at, one in zip(which, done[0], strict=True):
            out[at] = one
    return to_block([one for one in out if one is not None], encoders[0].tokenizer)


def _whole_rows(rows: Rows, memory: Memory, seq_len: int) -> tuple[Rows, Memory]:
    """The full rows of `concat`, and the last one's segments where it is not full."""
    lengths = rows.lengths
    full = len(rows) - int(len(rows) > 0 and lengths[-1] < seq_len)
    first = int(rows.offsets[full])
    rest = rows.segments[np.arange(first, len(rows.segments))]
    kept = Rows(rows.segments[np.arange(first)], rows.offsets[:full + 1], rows.supervised[:full], rows.learned[:first])
    return kept, memory.taken(rest, open=memory.open and len(rest) > 0)
