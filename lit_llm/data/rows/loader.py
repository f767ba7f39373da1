"""Collate rows into batches, in an order that is a function of (seed, epoch) and can be resumed at any step.

A ledger tells what was drawn of each source up to there. Not a torch DataLoader: Lightning takes any iterable with a
length, saves its `state_dict` and gives it back. Knows of ranks and accumulation only as numbers; nothing of text or
devices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch

from lit_llm.data.rows.corpus import Corpus, Tally
from lit_llm.data.rows.identity import differences
from lit_llm.data.rows.packing import Rows
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import IGNORE_INDEX


class Batch(TypedDict):
    """One micro-batch of one rank, on the CPU; B rows, T tokens.

    B is at most `batch_size`: rows that do not exist are not made. A rank that has no row while others have some gets
    one row of two padding tokens, so that all ranks can make the same collective calls.

    Two rows of five, `a b | x y z` and `p q` with padding `_`:

        input_ids     a  b  x  y  z      p  q  _  _  _
        labels        .  b  .  y  z      .  q  .  .  .      `.` is -100: each first token, context, padding
        position_ids  0  1  0  1  2      0  1  0  1  2
        cu_seqlens    0     2            5     7       10   bounds in the flattened B*T; padding is a segment too
    """

    input_ids: torch.Tensor                             # (B, T) int64
    labels: torch.Tensor                                # (B, T) int64, unshifted
    position_ids: torch.Tensor                          # (B, T) int64
    cu_seqlens: torch.Tensor                            # (segments + 1,) int32
    max_seqlen: int                                     # the longest segment
    num_supervised: int                                 # labels that are not -100, here
    num_supervised_in_step: int                         # the same over all micro-batches and ranks of the step
    last_in_step: bool                                  # whether the optimizer steps after this one
    num_bytes: int                                      # UTF-8 bytes that the supervised tokens stand for
    num_tokens: int                                     # tokens that are not padding
    num_tokens_in_step: int                             # the same over all micro-batches and ranks of the step
    idle: NotRequired[bool]                             # no rank has a supervised token here: no forward is needed
    step_is_unknown: NotRequired[bool]                  # of an own DataLoader: `_in_step` counts this batch alone


class Share(NamedTuple):
    """Which of a step's rows a rank computes in one micro-batch: rows `start` to `stop` of the step.

    Args:
        start: Of the rank's rows.
        stop: Behind them; equal to `start` where the rank has none.
        done: Rows of the step that all ranks have computed before this micro-batch.
        idle: Whether no rank has a row here.
    """

    start: int
    stop: int
    done: int
    idle: bool


def deal(rows: int, micro: int, *, rank: int, world: int, accumulate: int, batch_size: int) -> Share:
    """Deal the rows of a step to its micro-batches and ranks.

    Micro-batches that get no row come first: gradients are reduced over ranks in a step's last micro-batch, which must
    therefore have some. Seven rows, `batch_size` 2, two ranks, `accumulate` 4:

        micro-batch   0       1       2       3
        rank 0        idle    idle    0 1     4 5
        rank 1        idle    idle    2 3     6
    """
    each = world * batch_size
    turn = micro - accumulate + math.ceil(rows / each)  # among the micro-batches that have rows
    if turn < 0:
        return Share(0, 0, 0, True)
    start = min(rows, turn * each + rank * batch_size)
    return Share(start, min(rows, start + batch_size), turn * each, not rows)


def collate(corpus: Corpus, rows: Rows, numbers: Sequence[int], *, seq_len: int, pad_id: int,
            token_bytes: np.ndarray) -> Batch:
    """The rows of these numbers as a batch."""
    return lay([[corpus.read(*segment) for segment in rows.row(number)] for number in numbers], seq_len=seq_len,
               pad_id=pad_id, token_bytes=token_bytes)


def lay(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], *, seq_len: int, pad_id: int,
        token_bytes: np.ndarray) -> Batch:
    """Rows side by side, padded to `seq_len`; of each, its segments' tokens and whether each is supervised.

    No rows at all become one row of two padding tokens. The step's totals are this batch's own until a loader that
    knows the step sets them.
    """
    if not rows:
        rows, seq_len = [[]], 2
    shape = (len(rows), seq_len)
    input_ids, position_ids = np.full(shape, pad_id, np.int64), np.empty(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    counting = np.arange(seq_len)
    bounds: list[int] = []
    num_tokens = 0
    for place, segments in enumerate(rows):
        at = 0
        for ids, supervised in segments:
            end = at + len(ids)
            input_ids[place, at:end] = ids
            labels[place, at + 1:end] = np.where(supervised[1:], ids[1:].astype(np.int64), IGNORE_INDEX)
            position_ids[place, at:end] = counting[:len(ids)]
            bounds.append(place * seq_len + at)
            at = end
        num_tokens += at
        if at < seq_len:
            position_ids[place, at:] = counting[:seq_len - at]
            bounds.append(place * seq_len + at)
    learned = labels[labels != IGNORE_INDEX]
    cu_seqlens = np.array([*bounds, len(rows) * seq_len], dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids), labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids), cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()), num_supervised=len(learned), num_supervised_in_step=len(learned),
        last_in_step=True, num_bytes=_bytes(input_ids, labels, position_ids, token_bytes), num_tokens=num_tokens,
        num_tokens_in_step=num_tokens, idle=not len(learned))


def _bytes(input_ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes that the supervised tokens stand for; what follows a control token at the start begins a text."""
    learned = labels != IGNORE_INDEX
    first = learned & (position_ids == 1)
    first[:, 1:] &= token_bytes[0][input_ids[:, :-1]] == 0
    return int(token_bytes[0][labels[learned & ~first]].sum() + token_bytes[1][labels[first]].sum())


class RowLoader:
    """Batches of one rank, whole accumulation windows only.

    An epoch is the rows in shuffled order, cut into windows of `G = world * accumulate * batch_size`, each of them a
    step whose rows `deal` hands out. So 1, 2 or 4 processes see the same rows in the same step while G is the same. The
    last window has the rows that are left: nothing is dropped, no rank ever has one micro-batch less, and
    `num_supervised_in_step` counts what is really there. So an epoch is whole steps for Lightning and for DeepSpeed
    alike, which count a part of a window differently. Rows without a supervised token belong to their step, but are not
    made: they have no gradient and no share in any metric.

    An iteration yields `len(self)` batches from where the state stands, over the end of the epoch if it must;
    without `shuffle` (evaluation) it always begins at the beginning and has no state to keep.

    Args:
        corpus: Where tokens lie.
        rows: What rows are made of, with their supervised tokens counted.
        batch_size: Rows per micro-batch and rank.
        seq_len: Tokens of a row.
        pad_id: Fills the rest of a row; never supervised.
        token_bytes: (2, V) bytes of each token, and of a text's first one, for `num_bytes`.
        seed: Of the order.
        rank: This process, of `world`.
        world: Processes that share each step.
        accumulate: Micro-batches of a step.
        shuffle: Whether an epoch has an order of its own.
        trim: Pad to the longest row of the batch, not to `seq_len`.
        fingerprint: What the rows are made of; a checkpoint of others is refused, by the names of the parts.
        draw: The rows of an epoch, where they differ from one to the next: as many as `rows`, which is the first's.
    """

    def __init__(self, corpus: Corpus, rows: Rows, *, batch_size: int, seq_len: int, pad_id: int,
                 token_bytes: np.ndarray, seed: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1,
                 shuffle: bool = True, trim: bool = False, fingerprint: Any = "",
                 draw: Callable[[int], Rows] | None = None) -> None:
        self.corpus, self.rows, self._draw = corpus, rows, draw
        self.batch_size, self.seq_len, self.pad_id, self.token_bytes = batch_size, seq_len, pad_id, token_bytes
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate
        self.shuffle, self.trim, self.fingerprint = shuffle, trim, fingerprint
        self.rows_per_step = world * accumulate * batch_size
        self._done = 0                                  # micro-batches handed out since the first epoch
        self._epoch = lru_cache(maxsize=2)(self._ordered)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return math.ceil(len(self.rows) / self.rows_per_step) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        begin = self._done if self.shuffle else 0
        for number in range(begin, begin + len(self)):
            batch = self.batch(number)
            if self.shuffle:                            # before the yield: Lightning saves while it holds this batch,
                self._done = number + 1                 # and never comes back after the last one
            yield batch

    def batch(self, number: int) -> Batch:
        """Micro-batch `number`, counted from the first epoch: a pure function of the arguments."""
        rows, lengths, _ = self._epoch(number // len(self))
        window, share = self._share(number)
        mine = window[share.start:share.stop]
        width = max(int(lengths[mine].max(initial=0)), 2) if self.trim else self.seq_len
        batch = collate(self.corpus, rows, mine.tolist(), seq_len=width, pad_id=self.pad_id,
                        token_bytes=self.token_bytes)
        assert batch["num_supervised"] == int(rows.supervised[mine].sum())
        batch["num_supervised_in_step"] = int(rows.supervised[window].sum())
        batch["num_tokens_in_step"] = int(lengths[window].sum())
        batch["last_in_step"] = number % self.accumulate == self.accumulate - 1
        batch["idle"] = share.idle
        return batch

    def alone(self, number: int) -> Iterator[tuple[str, Batch]]:
        """Each segment of a micro-batch as a batch of its own, with the place of its record."""
        rows, _, _ = self._epoch(number // len(self))
        window, share = self._share(number)
        for row in window[share.start:share.stop].tolist():
            for segment in range(int(rows.offsets[row]), int(rows.offsets[row + 1])):
                one = rows.segments[np.array([segment])]
                yield self.corpus.place(int(one.sequence[0])), collate(
                    self.corpus, Rows(one, np.array([0, 1]), np.zeros(1, np.int64), np.zeros(1, np.int64)), [0],
                    seq_len=max(2, int(one.lengths[0])), pad_id=self.pad_id, token_bytes=self.token_bytes)

    def _share(self, number: int) -> tuple[np.ndarray, Share]:
        """Numbers of the rows of the whole step that a micro-batch is part of, and this rank's share of them."""
        epoch, within = divmod(number, len(self))
        step, micro = divmod(within, self.accumulate)
        rows, _, order = self._epoch(epoch)
        window = order[step * self.rows_per_step:(step + 1) * self.rows_per_step]
        window = window[rows.supervised[window] > 0]
        return window, deal(len(window), micro, rank=self.rank, world=self.world, accumulate=self.accumulate,
                            batch_size=self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch as they are drawn."""
        return self._epoch(epoch)[2]

    def _ordered(self, epoch: int) -> tuple[Rows, np.ndarray, np.ndarray]:
        """An epoch's rows, their lengths, and their numbers in order; equal on all ranks."""
        rows = self._draw(epoch) if self._draw else self.rows
        count = len(rows)
        assert count == len(self.rows), "the epochs of a run have equally many rows"
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        return rows, rows.lengths, order

    # ---- what was drawn ----------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Tally:
        """What all ranks have drawn of each source so far."""
        return self.drawn(self._done)

    def drawn(self, batches: int) -> Tally:
        """What all ranks draw of each source in so many micro-batches of each since the first epoch.

        A function of their number alone: right after a resume, and the same on every rank.
        """
        epoch, within = divmod(batches, len(self))
        if self._draw:
            total = sum((self.corpus.tally(self._draw(number)) for number in range(epoch)), start=np.int64(0))
        else:
            total = epoch * self.corpus.tally(self.rows)
        rows, _, order = self._epoch(epoch)
        window, share = self._share(batches)
        begun = order[:within // self.accumulate * self.rows_per_step]
        return self.corpus.named(total + self.corpus.tally(rows.take(np.append(begun, window[:share.done]))))

    @property
    def position(self) -> int:
        """Micro-batches handed out since the first epoch."""
        return self._done

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; equal on all ranks, since DDP and ZeRO keep only that of rank 0."""
        return {"epoch": self._done // len(self), "batches": self._done, "accumulate_grad_batches": self.accumulate,
                **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the very next batch; between two steps also with their rows divided anew.

        Other numbers of processes, micro-batches and rows in one are no matter where a step has as many rows as before.

        Raises:
            InputError: The state belongs to other data or steps; it names what differs.
        """
        saved = int(state.get("accumulate_grad_batches", self.accumulate))
        steps, within = divmod(int(state.get("batches", 0)), saved)
        known = self._identity() | ({"accumulate_grad_batches": self.accumulate} if within else {})
        differs = [f"{key} was {state.get(key)} and is {value}" for key, value in known.items()
                   if key != "data" and state.get(key) != value]
        differs = differences(state.get("data"), self.fingerprint) + differs
        if differs:
            raise InputError("the checkpoint cannot continue on these batches: " + "; ".join(differs), where="data",
                             fix="Give the same data and settings, or start a new run from its weights; rows_per_step "
                             "is batch_size * accumulate_grad_batches * devices.")
        self._done = steps * self.accumulate + within

    def _identity(self) -> dict[str, Any]:
        return {"data": self.fingerprint, "seed": self.seed, "rows_per_step": self.rows_per_step}
