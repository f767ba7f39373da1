"""Repeat the records of several sources endlessly, in an order given by the seed, from any position.

A source that ends starts again with its files in another order; the next source is chosen by the weights and by what
was drawn so far.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice

import numpy as np

from lit_llm.data.records.record import Found, LongText
from lit_llm.data.records.sources import Source
from lit_llm.data.tokens.encode import Item, SourceEncoder
from lit_llm.errors import InputError

SAMPLE = 1 << 14                                        # bytes at each end of a file that are hashed to detect changes


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of the next record of a source.

    Args:
        drawn: Number of records before it, over all passes.
        turn: Number of the pass.
        part: Index in that pass's order of files.
        record: Number of records of the file before it.
        piece: Number of pieces of its long document before it.
    """

    drawn: int = 0
    turn: int = 0
    part: int = 0
    record: int = 0
    piece: int = 0


class Feed:
    """Yields the records of several sources endlessly.

    The next record is from a source whose share of the records drawn is below its weight's, so each source always has
    its share to within one record.

    Args:
        encoders: Encoders of the sources, which split long documents.
        seed: Seed of the order of files.
        cursors: Where to start; null is the beginning.
    """

    def __init__(self, encoders: Sequence[SourceEncoder], *, seed: int,
                 cursors: Sequence[Cursor] | None = None) -> None:
        self.encoders, self.seed = encoders, seed
        self.cursors = list(cursors or [Cursor()] * len(encoders))      # after the last yielded record

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        """Yield (index of the source, record or piece with its place)."""
        streams = [self._endless(number) for number in range(len(self.encoders))]
        while True:
            number = self._next()
            yield number, next(streams[number])

    def _next(self) -> int:
        """The source of the next record; an unfinished document is completed first."""
        for number, cursor in enumerate(self.cursors):
            if cursor.piece:
                return number
        drawn, weights = [cursor.drawn for cursor in self.cursors], [encoder.source.weight for encoder in self.encoders]
        behind = [number for number, count in enumerate(drawn)          # Balinski and Young's quota method
                  if count * sum(weights) < weights[number] * (sum(drawn) + 1)]
        return min(behind, key=lambda number: (drawn[number] + 1) / weights[number])

    def _endless(self, number: int) -> Iterator[Item]:
        parts = self.encoders[number].source.parts()
        while True:
            begun = self.cursors[number]
            order = np.random.default_rng([self.seed, number, begun.turn]).permutation(len(parts))
            for place in range(begun.part, len(parts)):
                yield from self._part(number, parts[order[place]]())
                self.cursors[number] = Cursor(self.cursors[number].drawn, begun.turn, place + 1)
            drawn = self.cursors[number].drawn
            if drawn == begun.drawn and not (begun.part or begun.record):
                raise InputError("the source has no record", where=self.encoders[number].source.path)
            self.cursors[number] = Cursor(drawn, begun.turn + 1)

    def _part(self, number: int, records: Iterator[Found]) -> Iterator[Item]:
        """The remaining records of a file; those already drawn are skipped without tokenizing."""
        for record, _ in islice(records, self.cursors[number].record):
            if isinstance(record, LongText):
                deque(record.blocks, maxlen=0)
        for record, place in records:
            here = self.cursors[number]
            behind = replace(here, drawn=here.drawn + 1, record=here.record + 1, piece=0)
            if not isinstance(record, LongText):
                self.cursors[number] = behind
                yield record, place
                continue
            for count, part in enumerate(self.encoders[number].parts_of(record)):
                if count >= here.piece:
                    self.cursors[number] = behind if part.last else replace(here, piece=count + 1)
                    yield part, place


def identity(source: Source) -> str:
    """Identify the data of a source without reading all of it, by the sizes of its files and a hash of their ends.

    Paths and names are not part of it, except for what determines how files are read.
    """
    if source.is_hub:
        return f"{len(source.parts())} shards of {source.subset or 'the default subset'}, {source.split}"
    files, digest, total = source.files(), sha256(), 0
    for path in files:
        size = path.stat().st_size
        total += size
        digest.update(f"{''.join(path.suffixes)} {size} ".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(SAMPLE))
            stream.seek(max(0, size - SAMPLE))
            digest.update(stream.read(SAMPLE))
    return f"{len(files)} files of {total:,} bytes ({digest.hexdigest()[:8]})"
