"""Keep the token sequences of a chunk in memory, with the interface of a store on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Self

import numpy as np

from lit_llm.data.rows.packing import Segments
from lit_llm.data.tokens.encode import SEQUENCE, Block, Item


@dataclass(slots=True)
class Memory:
    """Sequences in memory, with the interface of a store.

    Args:
        tokens: All sequences concatenated.
        marks: As in a store.
        sequences: (N,) SEQUENCE; `number` is an index into `places`.
        source: (N,) the source of each sequence.
        begins: (N,) bool, whether it is the beginning of a document or conversation.
        open: Whether the last one continues in the next chunk.
        places: Places of records.
    """

    tokens: np.ndarray
    marks: np.ndarray
    sequences: np.ndarray
    source: np.ndarray
    begins: np.ndarray
    open: bool = False
    places: Sequence[str] = ()

    @classmethod
    def empty(cls, dtype: np.dtype) -> Self:
        """An empty memory."""
        return cls(np.zeros(0, dtype), np.zeros(0, np.uint8), np.zeros(0, SEQUENCE), np.zeros(0, np.int64),
                   np.zeros(0, bool))

    def place(self, sequence: int) -> str:
        """Place of the record of a sequence."""
        return self.places[int(self.sequences["number"][sequence])]

    def taken(self, segments: Segments, *, open: bool) -> "Memory":
        """Some segments, each as a separate sequence."""
        old = self.sequences[segments.sequence]
        where = [slice(at, at + length) for at, length in
                 zip((old["offset"] + segments.start).tolist(), segments.lengths.tolist(), strict=True)]
        table = old.copy()
        table["length"], table["number"] = segments.lengths, 0
        table["supervised"] = [int((self.marks[part][1:] & 1).sum()) for part in where]
        table["offset"] = np.cumsum(segments.lengths) - segments.lengths
        nothing = Memory.empty(self.tokens.dtype)
        return Memory(np.concatenate([nothing.tokens, *(self.tokens[part] for part in where)]),
                      np.concatenate([nothing.marks, *(self.marks[part] for part in where)]), table,
                      self.source[segments.sequence], self.begins[segments.sequence] & (segments.start == 0), open)


def joined(remainder: Memory, batches: Sequence[Sequence[tuple[int, Item]]], blocks: Sequence[Block]) -> Memory:
    """All sequences of a chunk after the remainder; consecutive pieces of one document become one sequence.

    Args:
        remainder: Remainder of the previous chunk.
        batches: Records, each with the index of its source.
        blocks: Their tokens.
    """
    tables, flags = [remainder.sequences], [np.ones((len(remainder.sequences), 2), dtype=bool)]
    sources, tokens, records = [remainder.source], len(remainder.tokens), 0
    if remainder.open:
        flags[0][-1, 1] = False
    for batch, done in zip(batches, blocks, strict=True):
        table = done.rows.copy()
        sources.append(np.array([number for number, _ in batch], dtype=np.int64)[table["number"]])
        table["offset"] += tokens
        table["number"] += records
        tables.append(table)
        flags.append(np.ones((len(table), 2), dtype=bool) if done.unbroken is None else done.unbroken.reshape(-1, 2))
        tokens, records = tokens + len(done.tokens), records + len(batch)
    table, unbroken = np.concatenate(tables), np.concatenate(flags)
    begins = unbroken[:, 0].copy()
    begins[:len(remainder.sequences)] = remainder.begins
    starts = np.flatnonzero(unbroken[:, 0] | np.concatenate([[True], unbroken[:-1, 1]])[:len(table)])
    whole = table[starts]
    if len(starts):
        whole["length"] = np.add.reduceat(table["length"], starts, dtype=np.int64)
        whole["ended"] = table["ended"][np.append(starts[1:], len(table)) - 1]
    places = [str(place) for _, (_, place) in chain.from_iterable(batches)]
    return Memory(np.concatenate([remainder.tokens, *(done.tokens for done in blocks)]),
                  np.concatenate([remainder.marks, *(done.marks for done in blocks)]), whole,
                  np.concatenate(sources)[starts], begins[starts], bool(len(table)) and not unbroken[-1, 1], places)
