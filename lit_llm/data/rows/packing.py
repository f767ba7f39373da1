"""Pack token sequences into packed sequences (rows) of at most `seq_len` tokens, given their lengths.

There are three policies: `best_fit` (never cuts, but pads; for SFT), `concat` (cuts at any token, pads only the last
row; for pretraining) and `none` (one segment per row). A new policy that does not cut is a function in `POLICIES`.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from lit_llm.errors import InputError, did_you_mean
from lit_llm.rules import Rule

Packing = Literal["best_fit", "concat", "none"] | str   # a name in POLICIES, or concat
Overlong = Literal["cut", "drop", "error"]
CONCAT = Rule("`data.packing: concat`", "conversations of which a part is supervised", "concat would "
              "separate answers from their questions", "data.packing",
              "Set data.packing to best_fit; concat is for documents.")


@dataclass(frozen=True, slots=True)
class Segments:
    """Sections of sequences: segment s is tokens `start[s]:stop[s]` of sequence `sequence[s]`; each (S,) int64.

    The first token of a segment is context only, because no token precedes it from which it could be predicted.
    """

    sequence: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, which: np.ndarray | slice) -> "Segments":
        return Segments(self.sequence[which], self.start[which], self.stop[which])

    def __add__(self, other: "Segments") -> "Segments":
        pairs = ((self.sequence, other.sequence), (self.start, other.start), (self.stop, other.stop))
        return Segments(*(np.concatenate(pair) for pair in pairs))

    @property
    def lengths(self) -> np.ndarray:
        """(S,) tokens."""
        return np.asarray(self.stop - self.start)


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed sequences (rows): the segments of each.

    Args:
        segments: All segments, grouped by row.
        offsets: (R + 1,) int64; row r is segments `offsets[r]:offsets[r + 1]`.
        supervised: (R,) int64, supervised tokens per row; zeros until `counted`.
        segment_supervised: (S,) int64, supervised tokens per segment.
    """

    segments: Segments
    offsets: np.ndarray
    supervised: np.ndarray
    segment_supervised: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __add__(self, other: "Rows") -> "Rows":
        """These rows followed by the others."""
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return Rows(self.segments + other.segments, offsets, np.concatenate([self.supervised, other.supervised]),
                    np.concatenate([self.segment_supervised, other.segment_supervised]))

    def take(self, numbers: np.ndarray) -> "Rows":
        """The rows with these numbers, in this order; numbers may repeat."""
        count = np.diff(self.offsets)[numbers]
        offsets = np.concatenate([[0], np.cumsum(count)])
        which = np.repeat(self.offsets[numbers] - offsets[:-1], count) + np.arange(offsets[-1])
        return Rows(self.segments[which], offsets, self.supervised[numbers], self.segment_supervised[which])

    def row(self, number: int) -> list[tuple[int, int, int]]:
        """(sequence, start, stop) of each segment of a row."""
        part = slice(self.offsets[number], self.offsets[number + 1])
        of = self.segments
        return list(zip(of.sequence[part].tolist(), of.start[part].tolist(), of.stop[part].tolist(), strict=True))

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens in each row, padding not counted."""
        return _sums(self.segments.lengths, self.offsets)

    def counted(self, supervised: np.ndarray) -> "Rows":
        """The same rows with the supervised tokens of each segment, (S,)."""
        return replace(self, supervised=_sums(supervised, self.offsets), segment_supervised=supervised)


@dataclass(frozen=True, slots=True)
class Split:
    """Result of `split`: the segments, and the indices of sequences that were cut or dropped."""

    segments: Segments
    cut: np.ndarray
    dropped: np.ndarray


def split(lengths: np.ndarray, is_document: np.ndarray, *, seq_len: int, overlong: Overlong = "cut",
          overlap: int = 1) -> Split:
    """Split sequences into segments of at most `seq_len` tokens, for policies that do not cut themselves.

    A long document becomes windows that overlap by ONE token, so that each token except the first is predicted exactly
    once, with every packing policy:

        tokens     a b c d e f g h          seq_len 4
        window 0   a b c d                  predicts b c d
        window 1         d e f g            predicts e f g
        window 2               g h          predicts h

    A long conversation keeps its beginning (`cut`: no answer without its question) or is left out (`drop`).

    Args:
        lengths: (N,) tokens of each sequence.
        is_document: (N,) bool; the others are conversations.
        seq_len: Tokens per packed sequence, at least 2.
        overlong: `error` raises for the first conversation that is too long; the index is in `where`.
        overlap: Tokens that a window shares with the one before. More than one are context for the first token that the
            window predicts, which evaluation can ask for (`Corpus.scored`).
    """
    long = lengths > seq_len
    too_long = np.flatnonzero(long & ~is_document)
    if overlong == "error" and len(too_long):
        raise InputError(f"it has {lengths[too_long[0]]} tokens, but data.seq_len is {seq_len}", where=str(too_long[0]),
                         fix="Raise data.seq_len, or set data.overlong to cut or drop.")
    indices = np.arange(len(lengths))[~(long & ~is_document) if overlong == "drop" else slice(None)]
    stride = seq_len - overlap
    count = np.where(long & is_document, -((overlap - lengths) // stride), 1)[indices]          # rounded up
    sequence = np.repeat(indices, count)
    within = np.arange(len(sequence)) - np.repeat(np.cumsum(count) - count, count)
    start = within * stride
    segments = Segments(sequence, start, np.minimum(start + seq_len, lengths[sequence]))
    nothing = too_long[:0]
    return Split(segments, *((nothing, too_long) if overlong == "drop" else (too_long, nothing)))


def pack(segments: Segments, *, seq_len: int, packing: Packing) -> Rows:
    """Pack segments into rows by a policy; with `concat`, segments may be longer than a row.

    >>> rows = pack(whole(np.array([3, 5, 2])), seq_len=5, packing="best_fit")
    >>> [rows.row(number) for number in range(len(rows))]
    [[(1, 0, 5)], [(0, 0, 3), (2, 0, 2)]]
    """
    segments = segments[segments.lengths > 0]
    if packing == "concat":
        segments, row_of = _concat(segments, seq_len)
    else:
        row_of = POLICIES[packing](segments.lengths, seq_len)
        _check_rows(packing, row_of, segments.lengths, seq_len)
        order = np.argsort(row_of, kind="stable")
        segments, row_of = segments[order], row_of[order]
    count = int(row_of[-1]) + 1 if len(row_of) else 0
    offsets = np.searchsorted(row_of, np.arange(count + 1)).astype(np.int64)
    return Rows(segments, offsets, np.zeros(count, dtype=np.int64), np.zeros(len(segments), dtype=np.int64))


def whole(lengths: np.ndarray) -> Segments:
    """One segment for each sequence."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return Segments(np.arange(len(lengths)), np.zeros_like(lengths), lengths)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing: put each length, longest first, into the row with the least remaining space.

    Equal lengths are placed together, and rows with equal remaining space are grouped, so the cost is a sort and a few
    operations per distinct length: 10 million lengths take seconds. The number of rows is at most about 11/9 of the
    optimum (Johnson 1974).

    Args:
        lengths: (N,) tokens, each at most `capacity`.
        capacity: Tokens per row.

    Returns:
        (N,) int64, the row of each item.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity)
    row_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    edges = np.flatnonzero(np.diff(lengths[order], prepend=0, append=0)) if len(order) else order
    piles: dict[int, list[np.ndarray]] = {}             # remaining space -> rows with exactly that space
    rooms: list[int] = []                               # the keys of piles, ascending
    rows = 0
    for begin, end in pairwise(edges.tolist()):
        items, length = order[begin:end], int(lengths[order[begin]])
        while len(items):
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
                open_rows = np.concatenate(piles.pop(room))
            else:
                room = capacity
                open_rows = np.arange(rows, rows + -(-len(items) // (capacity // length)))
                rows += len(open_rows)
            per_row = room // length
            taken = min(len(items), len(open_rows) * per_row)
            full, rest = divmod(taken, per_row)
            row_of[items[:taken]] = np.repeat(open_rows[:full + 1], per_row)[:taken]
            items = items[taken:]
            for left, piled in ((room - per_row * length, open_rows[:full]),
                                (room - rest * length, open_rows[full:full + 1]),
                                (room, open_rows[full + 1:])):
                if left and len(piled):
                    if left not in piles:
                        insort(rooms, left)
                    piles.setdefault(left, []).append(piled)
    return row_of


def one_each(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Put each item into its own row."""
    return np.arange(len(lengths))


Policy = Callable[[np.ndarray, int], np.ndarray]        # (N,) lengths, seq_len -> (N,) the row of each, from 0, no gaps
POLICIES: dict[str, Policy] = {"best_fit": best_fit, "none": one_each}


def check(packing: str) -> None:
    """Refuse a policy that does not exist.

    Raises:
        InputError: The error lists the existing ones.
    """
    if packing not in (policies := ["concat", *POLICIES]):
        raise InputError(f"'{packing}' is not one of {', '.join(policies)}.{did_you_mean(packing, policies)}",
                         where="data.packing")


def _check_rows(packing: str, row_of: np.ndarray, lengths: np.ndarray, seq_len: int) -> None:
    """Refuse a wrong result of a user's policy, which would lose tokens or make batches that are too large."""
    if packing in ("best_fit", "none"):
        return
    if len(row_of) != len(lengths) or not np.array_equal(np.unique(row_of), np.arange(row_of.max(initial=-1) + 1)):
        raise InputError(f"the packing policy '{packing}' must return the index of a packed sequence for each of "
                         f"{len(lengths):,} segments, counted from 0 without gaps", where="data.packing")
    if len(lengths) and (longest := int(np.bincount(row_of, weights=lengths).max())) > seq_len:
        raise InputError(f"the packing policy '{packing}' made a packed sequence of {longest:,} tokens, but "
                         f"data.seq_len is {seq_len:,}", where="data.packing")


def _concat(segments: Segments, seq_len: int) -> tuple[Segments, np.ndarray]:
    """Concatenate all segments and cut every `seq_len` tokens; the last row may be short."""
    ends = np.cumsum(segments.lengths)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.sort(np.concatenate([ends - segments.lengths, np.arange(0, total, seq_len)]), kind="stable")
    cuts = cuts[np.diff(cuts, prepend=-1) > 0]
    stops = np.append(cuts[1:], total)[:len(cuts)]
    owner = np.searchsorted(ends, cuts, side="right")
    shift = segments.start[owner] - (ends - segments.lengths)[owner]
    return Segments(segments.sequence[owner], cuts + shift, stops + shift), cuts // seq_len


def _sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(total[offsets[1:]] - total[offsets[:-1]])
