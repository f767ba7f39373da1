"""Several token stores as one list of sequences.

Offsets and lengths are arrays in memory; tokens are read from disk when needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from lit_llm.data.rows.packing import Rows, Segments
from lit_llm.data.tokens.encode import DOCUMENT
from lit_llm.text.tokenizer import SPEAKERS

Tally = dict[str, dict[str, int]]                       # source -> {sequences, tokens, supervised}
ANSWER = SPEAKERS.index("assistant") << 1 | 1           # mark of a supervised token of the assistant
COUNTED = 2**28                                         # tokens that `occurrences` counts, within seconds
BLOCK = 2**24


@dataclass(frozen=True, slots=True)
class Occurrences:
    """Counts of each token of a vocabulary in a corpus.

    Args:
        read: (V,) all occurrences.
        supervised: (V,) occurrences as a supervised token.
        whole: Whether the whole corpus was counted.
    """

    read: np.ndarray
    supervised: np.ndarray
    whole: bool = True


class Store(Protocol):
    """Token sequences on disk, or those of a stream that are in memory."""

    tokens: np.ndarray
    marks: np.ndarray
    sequences: np.ndarray

    def place(self, sequence: int) -> str:
        """Place of the record of a sequence."""


class Corpus:
    """Several stores as one list of N sequences.

    Args:
        draws: Each store with the indices of its sequences, in order.
        end: Whether documents keep their end-of-text token: in training, but not in evaluation.
        names: Names of the stores, for reports.
        overlap: Tokens that a window of a long document shares with the one before; they are its context.
    """

    def __init__(self, draws: Sequence[tuple[Store, np.ndarray]], *, end: bool = True,
                 names: Sequence[str] = (), overlap: int = 1) -> None:
        self.overlap = overlap
        self.stores, self.names = [store for store, _ in draws], list(names or [""] * len(draws))
        self.store_of = np.repeat(np.arange(len(draws)), [len(which) for _, which in draws])
        self.index = np.concatenate([which for _, which in draws] or [np.empty(0, np.int64)])
        self.lengths, self.supervised = np.zeros(len(self.index), np.int64), np.zeros(len(self.index), np.int64)
        self.is_document = np.zeros(len(self.index), bool)
        for number, (store, which) in enumerate(draws):
            here, rows = self.store_of == number, store.sequences[which]
            without = 0 if end else rows["ended"].astype(np.int64)
            self.lengths[here] = rows["length"] - without
            self.supervised[here] = rows["supervised"] - without
            self.is_document[here] = rows["kind"] == DOCUMENT

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start:stop` of a sequence, and whether each is supervised."""
        tokens, marks = self.scored(sequence, start, stop)
        return tokens, (marks & 1).view(bool)

    def scored(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start:stop` of a sequence, and their marks without those that only the window before supervises."""
        tokens, marks = self.marked(sequence, start, stop)
        if start and self.overlap > 1 and self.is_document[sequence]:
            marks = marks.copy()
            marks[:self.overlap] &= 0xFE
        return tokens, marks

    def marked(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start:stop` of a sequence, and their marks as stored."""
        store = self.stores[self.store_of[sequence]]
        first = int(store.sequences["offset"][self.index[sequence]])
        part = slice(first + start, first + stop)
        return store.tokens[part], store.marks[part]

    def count(self, segments: Segments) -> np.ndarray:
        """(S,) supervised tokens of each segment, without its first token."""
        counts = segments.lengths - np.where(segments.start > 0, self.overlap, 1)
        conversations = np.flatnonzero(~self.is_document[segments.sequence])
        counts[conversations] = self.supervised[segments.sequence[conversations]]
        cut = conversations[segments.lengths[conversations] != self.lengths[segments.sequence[conversations]]]
        for segment in cut.tolist():
            place = (int(values[segment]) for values in (segments.sequence, segments.start, segments.stop))
            counts[segment] = int(self.read(*place)[1][1:].sum())
        return counts

    def marks_at(self, sequence: np.ndarray, place: np.ndarray) -> np.ndarray:
        """(S,) marks of one token in each of these sequences."""
        marks = np.zeros(len(sequence), np.uint8)
        for number, store in enumerate(self.stores):
            here = np.flatnonzero(self.store_of[sequence] == number)
            marks[here] = store.marks[store.sequences["offset"][self.index[sequence[here]]] + place[here]]
        return marks

    def endless(self, segments: Segments, stop_ids: Sequence[int]) -> bool:
        """Whether answers are supervised but none includes its stop token; stops at the first that does."""
        answers = False
        for conversation in np.flatnonzero(~self.is_document[segments.sequence]).tolist():
            place = (int(values[conversation]) for values in (segments.sequence, segments.start, segments.stop))
            tokens, marks = self.marked(*place)
            if np.isin(tokens[1:][(marks[1:] & 1).view(bool)], stop_ids).any():
                return False
            answers = answers or bool((marks == ANSWER).any())
        return answers

    def occurrences(self, vocabulary: int) -> Occurrences:
        """Count how often each token occurs and is supervised; for a huge corpus, in an equal part of each store.

        Args:
            vocabulary: Vocabulary size V.
        """
        read, supervised = np.zeros(vocabulary, np.int64), np.zeros(vocabulary, np.int64)
        most = max(1, COUNTED // max(1, len(self.stores)))
        whole = True
        for number, store in enumerate(self.stores):
            wanted = np.zeros(len(store.sequences), bool)
            wanted[self.index[self.store_of == number]] = True
            ends = np.cumsum(store.sequences["length"], dtype=np.int64)
            whole &= not len(ends) or int(ends[-1]) <= most
            first = 0
            while first < len(ends) and (begun := int(ends[first - 1]) if first else 0) < most:
                last = max(first + 1, int(np.searchsorted(ends, begun + BLOCK, side="right")))
                place = int(store.sequences["offset"][first])
                part = slice(place, place + int(ends[last - 1]) - begun)
                is_counted = np.repeat(wanted[first:last], store.sequences["length"][first:last])
                tokens = store.tokens[part][is_counted]
                read += np.bincount(tokens, minlength=vocabulary)[:vocabulary]
                marks = (store.marks[part][is_counted] & 1).view(bool)
                supervised += np.bincount(tokens[marks], minlength=vocabulary)[:vocabulary]
                first = last
        return Occurrences(read, supervised, whole)

    def column(self, name: str) -> np.ndarray:
        """(N,) a column of the stores' tables, such as `content`."""
        parts = [store.sequences[name][self.index[self.store_of == number]] for number, store in enumerate(self.stores)]
        return np.concatenate(parts or [np.empty(0, np.int64)])

    def tally(self, rows: Rows) -> np.ndarray:
        """(stores, 3): sequences, tokens and supervised tokens of each store in these packed sequences.

        A sequence that is split into several segments is counted with its first segment.
        """
        owner, segments = self.store_of[rows.segments.sequence], rows.segments
        counts = [np.bincount(owner, weights=values, minlength=len(self.stores))
                  for values in (segments.start == 0, segments.lengths, rows.segment_supervised)]
        return np.stack(counts, axis=1).astype(np.int64)    # exact: float64 represents counts up to 2^53

    def named(self, tally: np.ndarray) -> Tally:
        """A tally by the names of the stores; stores of the same name are added."""
        out = {name: dict.fromkeys(("sequences", "tokens", "supervised"), 0) for name in self.names}
        for name, values in zip(self.names, tally.tolist(), strict=True):
            for key, value in zip(out[name], values, strict=True):
                out[name][key] += value
        return out

    def record_of(self, sequences: np.ndarray) -> np.ndarray:
        """(S,) numbers of the records of some sequences in their sources."""
        records = np.zeros(len(sequences), np.int64)
        for number, store in enumerate(self.stores):
            here = self.store_of[sequences] == number
            records[here] = store.sequences["record"][self.index[sequences[here]]]
        return records

    def place(self, sequence: int) -> str:
        """Place of the record of a sequence."""
        return str(self.stores[self.store_of[sequence]].place(int(self.index[sequence])))
