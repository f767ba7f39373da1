"""Repeat the records of several sources endlessly, in an order given by the seed, from any position.

A source that ends begins again with its files in another order; which source is next follows from the weights and from
what was drawn.
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

SAMPLE = 1 << 14                                        # bytes at each end of a file that tell whether it changed


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the next record of a source stands.

    Args:
        drawn: Records before it, over all passes.
        turn: The pass it belongs to.
        part: A place in that pass's order of files.
        record: Records of the file before it.
        piece: Pieces of the record before it, where that is a long document.
    """

    drawn: int = 0
    turn: int = 0
    part: int = 0
    record: int = 0
    piece: int = 0


class Feed:
    """An endless sequence of the records of several sources.

    The next record is from a source that is behind its weight's share of the records drawn, so at any moment each
    source has its share to within a record.

    Args:
        encoders: Of the sources; they know where a long document may be cut.
        seed: Of the order of files.
        cursors: Where to begin; null is the beginning.
    """

    def __init__(self, encoders: Sequence[SourceEncoder], *, seed: int,
                 cursors: Sequence[Cursor] | None = None) -> None:
        self.encoders, self.seed = encoders, seed
        self.cursors = list(cursors or [Cursor()] * len(encoders))      # behind the record handed out last

    def __iter__(self) -> Iterator[tuple[int, Item]]:
        """(number of its source, record or piece of one with its place)."""
        streams = [self._endless(number) for number in range(len(self.encoders))]
        while True:
            number = self._next()
            yield number, next(streams[number])

    def _next(self) -> int:
        """The source of the next record; a document that was begun is read to its end first."""
        for number, cursor in enumerate(self.cursors):
            if cursor.piece:
                return number
        drawn, weights = [cursor.drawn for cursor in self.cursors], [each.source.weight for each in self.encoders]
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
                raise InputError("there is no record in it", where=self.encoders[number].source.path)
            self.cursors[number] = Cursor(drawn, begun.turn + 1)

    def _part(self, number: int, found: Iterator[Found]) -> Iterator[Item]:
        """What a file still holds; what was drawn of it is read over, which costs no tokenizing."""
        for record, _ in islice(found, self.cursors[number].record):
            if isinstance(record, LongText):
                deque(record.blocks, maxlen=0)
        for record, place in found:
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
    """What a source is made of, without reading all of it: sizes of its files, and a hash of their ends.

    Where the files lie and how they are called is no part of it, but for what tells how they are read.
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
