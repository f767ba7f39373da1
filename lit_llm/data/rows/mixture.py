"""Select each epoch's packed sequences from weighted sources, and split records into training, validation and test.

Everything is a function of the records, the settings and the seed.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from lit_llm.data.rows import packing as pack
from lit_llm.data.rows.corpus import ANSWER, Corpus
from lit_llm.data.rows.packing import Overlong, Packing, Rows, Segments
from lit_llm.errors import InputError

Stage = Literal["train", "val", "test", "guard"]
COPIES = 10_000_000                                     # limit on sequences of an epoch due to weights


class Mixture:
    """The packed sequences (rows) of a stage, epoch by epoch.

    A weight of 2.25 draws a source's sequences twice in every epoch, and a quarter of them once more. This quarter is a
    different one in each epoch: of n sequences in a seeded order, epoch e takes k from position `e * k`, cyclically, so
    all were drawn after `ceil(n / k)` epochs. With n = 5, k = 2:

        order      c a e b d
        epoch 0    c a
        epoch 1        e b
        epoch 2    c       d

    The constant part is packed once; the rotating part is packed for each epoch and fills as many rows as in the first
    epoch, because the steps of a run are counted before it starts: if packing gives a few rows more or less, that many
    of the rotating part are left out or repeated. The report counts what was drawn.

    Args:
        corpus: The sequences.
        weights: Weight of each store.
        seq_len: Tokens per packed sequence.
        packing: As in `packing.py`. With `concat` the rotating part is windows of `seq_len`, concatenated as well.
        overlong: What to do with conversations longer than `seq_len`.
        seed: Seed of the rotating part's order, and of the order of `concat`.

    Raises:
        InputError: A conversation is too long and `overlong` is `error`; the error names the place.
    """

    def __init__(self, corpus: Corpus, weights: Sequence[float], *, seq_len: int, packing: Packing = "best_fit",
                 overlong: Overlong = "cut", seed: int = 0) -> None:
        self.corpus, self.seq_len, self.packing, self.seed = corpus, seq_len, packing, seed
        self.notes: dict[str, int] = {}                 # reason for cutting or dropping -> sequences
        copies, rest = np.divmod(np.asarray(weights, dtype=np.float64), 1)
        stream = packing == "concat"
        pieces = self._pieces(overlong) if rest.any() or not stream else pack.whole(corpus.lengths)
        whole = pack.whole(corpus.lengths) if stream else pieces
        _check_copies(corpus, whole, weights, seq_len)
        always = _copied(corpus.store_of[whole.sequence], copies)
        self._always = self._packed(whole[np.random.default_rng(seed).permutation(always) if stream else always])
        owner = corpus.store_of[pieces.sequence]
        self._parts = [_Part(pieces[np.flatnonzero(owner == store)], share, [seed, store])
                       for store, share in enumerate(rest.tolist()) if share and (owner == store).any()]
        self.first = self._always + self._moving(0) if self._parts else self._always

    def rows(self, epoch: int) -> Rows:
        """The packed sequences of an epoch; every epoch has the same number."""
        if not self._parts or not epoch:
            return self.first
        part, room = self._moving(epoch), len(self.first) - len(self._always)
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(len(part))
        return self._always + part.take(np.resize(order, room))

    @property
    def moves(self) -> bool:
        """Whether epochs differ in more than their order."""
        return bool(self._parts)

    def _pieces(self, overlong: Overlong) -> Segments:
        """Segments of at most `seq_len` tokens with supervised tokens; the others are counted in `notes`."""
        corpus = self.corpus
        windows = corpus.is_document if self.packing != "concat" else np.ones(len(corpus), dtype=bool)
        try:
            split = pack.split(corpus.lengths, windows, seq_len=self.seq_len, overlong=overlong,
                               overlap=corpus.overlap)
        except InputError as error:
            raise InputError(error.what, where=corpus.place(int(error.where)), fix=error.fix) from None
        is_supervised = corpus.count(split.segments) > 0
        segments = split.segments[is_supervised]
        cut = np.flatnonzero((segments.stop < corpus.lengths[segments.sequence]) & ~windows[segments.sequence])
        last, lost = (corpus.marks_at(segments.sequence[cut], segments.stop[cut] - back) for back in (1, 0))
        self.notes = {"cut": len(split.cut), "cut_in_an_answer": int(((last == ANSWER) & (lost == ANSWER)).sum()),
                      "dropped_overlong": len(split.dropped), "dropped_nothing_left": int((~is_supervised).sum())}
        return segments

    def _moving(self, epoch: int) -> Rows:
        first, *others = (part.take(epoch) for part in self._parts)
        return self._packed(sum(others, first))

    def _packed(self, segments: Segments) -> Rows:
        rows = pack.pack(segments, seq_len=self.seq_len, packing=self.packing)
        return rows.counted(self.corpus.count(rows.segments))


class _Part:
    """The rotating part of one source: `share` of its segments in each epoch, at least one."""

    def __init__(self, segments: Segments, share: float, seed: list[int]) -> None:
        self.segments = segments[np.random.default_rng(seed).permutation(len(segments))]
        self.size = max(1, round(share * len(segments)))

    def take(self, epoch: int) -> Segments:
        return self.segments[(epoch * self.size + np.arange(self.size)) % len(self.segments)]


def _check_copies(corpus: Corpus, whole: Segments, weights: Sequence[float], seq_len: int) -> None:
    """Refuse weights whose copies would not fit in memory; each copy takes about a hundred bytes."""
    counts = np.bincount(corpus.store_of[whole.sequence], np.maximum(1, whole.lengths // seq_len), len(weights))
    drawn, most = counts * np.asarray(weights, dtype=np.float64), max(COPIES, 2 * int(counts.sum()))
    if drawn.sum() > most:
        store = int(drawn.argmax())
        raise InputError(f"with a weight of {weights[store]:g}, an epoch has {drawn[store]:,.0f} sequences of it, but "
                         f"all sources together may have at most {most:,}", where=corpus.names[store],
                         fix="Lower the weight, and raise trainer.max_epochs.")


def _copied(owner: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Indices of constant draws, repeated as often as their store's weight says."""
    return np.concatenate([np.flatnonzero(copies[owner] > turn) for turn in range(int(copies.max(initial=0)))]
                          or [np.empty(0, np.int64)])


# ---- splits ----------------------------------------------------------------------------------------------------------

def side(content: np.ndarray, stage: Stage, *, val_fraction: float, test_fraction: float) -> np.ndarray:
    """(N,) bool: which records belong to a stage, by the hash of their content.

    Validation uses the lowest hashes and test the highest, so a record changes its split only if the share of that
    split changes, and never because other records were added; equal records stay together.

        0 |--- val ---|---------------- train ----------------|-- test --| 2^64
    """
    val = content < np.uint64(val_fraction * 2.0**64)
    test = content > np.uint64(2**64 - 1 - int(test_fraction * 2.0**64))
    return {"val": val, "test": test, "train": ~val & ~test}[stage]


def repeats(corpus: Corpus) -> np.ndarray:
    """(N,) bool: whether a sequence belongs to an exact duplicate of an earlier record, of any source.

    The sequences of one record have the same content and stay together.
    """
    keys = np.stack([corpus.store_of, corpus.column("record")])
    record = np.cumsum((np.diff(keys, axis=1, prepend=-1) != 0).any(axis=0))
    _, first, inverse = np.unique(corpus.column("content"), return_index=True, return_inverse=True)
    return np.asarray(record != record[first][inverse])
