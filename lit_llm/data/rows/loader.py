"""Collate packed sequences into batches, in an order that is a function of (seed, epoch) and resumable at any step.

It reports what was drawn of each source. It is not a torch DataLoader: Lightning accepts any iterable with a length,
and saves and restores its `state_dict`. Ranks and accumulation are plain numbers here.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch

from lit_llm.data.rows.cells import cells_of, short_names
from lit_llm.data.rows.corpus import Corpus, Tally
from lit_llm.data.rows.identity import differences
from lit_llm.data.rows.packing import Rows
from lit_llm.errors import InputError
from lit_llm.text.tokenizer import IGNORE_INDEX


class Batch(TypedDict):
    """One micro-batch of one rank, on the CPU: B packed sequences (rows) of T tokens.

    B is at most `batch_size`; a smaller batch is not filled up. A rank without a packed sequence, while other ranks
    have some, gets one of two padding tokens, so that all ranks make the same collective calls.

    Two rows of five, `a b | x y z` and `p q` with padding `_`:

        input_ids     a  b  x  y  z      p  q  _  _  _
        labels        .  b  .  y  z      .  q  .  .  .      `.` is -100: each first token, context, padding
        position_ids  0  1  0  1  2      0  1  0  1  2
        cu_seqlens    0     2            5     7       10   boundaries in the flattened B*T; padding is a segment
    """

    input_ids: torch.Tensor                             # (B, T) int64
    labels: torch.Tensor                                # (B, T) int64, unshifted
    position_ids: torch.Tensor                          # (B, T) int64
    cu_seqlens: torch.Tensor                            # (segments + 1,) int32
    max_seqlen: int                                     # the longest segment
    num_supervised: int                                 # labels that are not -100, here
    num_supervised_in_step: int                         # the same over all micro-batches and ranks of the step
    last_in_step: bool                                  # whether the optimizer steps after this one
    num_bytes: int                                      # UTF-8 bytes of the supervised tokens
    num_tokens: int                                     # tokens that are not padding
    num_tokens_in_step: int                             # the same over all micro-batches and ranks of the step
    idle: NotRequired[bool]                             # no rank has a supervised token: no forward pass is needed
    cells: NotRequired[torch.Tensor]                    # (C, 7) int64: in evaluation, see `cells.Cells`
    cell_of_token: NotRequired[torch.Tensor]            # (num_supervised,) int64: the cell of each supervised token
    sources: NotRequired[tuple[str, ...]]               # names of the sources that cells name by index
    step_is_unknown: NotRequired[bool]                  # of a user's DataLoader: `_in_step` counts this batch only


class Share(NamedTuple):
    """The packed sequences of a step that a rank computes in one micro-batch: `start` to `stop`.

    Args:
        start: First one of the rank.
        stop: End of those of the rank; equal to `start` if it has none.
        done: Number of them that all ranks computed before this micro-batch of the step.
        idle: Whether no rank has one here.
    """

    start: int
    stop: int
    done: int
    idle: bool


def deal(rows: int, micro: int, *, rank: int, world: int, accumulate: int, batch_size: int) -> Share:
    """Distribute the packed sequences of a step over its micro-batches and ranks.

    Empty micro-batches come first, because gradients are reduced over ranks in a step's last micro-batch, which must
    not be empty. Seven packed sequences, `batch_size` 2, two ranks, `accumulate` 4:

        micro-batch   0       1       2       3
        rank 0        idle    idle    0 1     4 5
        rank 1        idle    idle    2 3     6
    """
    rows_per_micro_batch = world * batch_size
    index = micro - accumulate + math.ceil(rows / rows_per_micro_batch)  # index among the micro-batches with rows
    if index < 0:
        return Share(0, 0, 0, True)
    start = min(rows, index * rows_per_micro_batch + rank * batch_size)
    return Share(start, min(rows, start + batch_size), index * rows_per_micro_batch, not rows)


def collate(corpus: Corpus, rows: Rows, numbers: Sequence[int], *, seq_len: int, pad_id: int,
            token_bytes: np.ndarray) -> Batch:
    """Collate the packed sequences with these numbers to a batch."""
    return batch_of([[corpus.read(*segment) for segment in rows.row(number)] for number in numbers], seq_len=seq_len,
               pad_id=pad_id, token_bytes=token_bytes)


def batch_of(rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]], *, seq_len: int, pad_id: int,
        token_bytes: np.ndarray) -> Batch:
    """Collate packed sequences, padded to `seq_len`; each is a list of (tokens, supervised) for its segments.

    Without any, the batch has one of two padding tokens. The totals of the step are those of this batch until a loader
    sets them.
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
    num_supervised = int((labels != IGNORE_INDEX).sum())
    cu_seqlens = np.array([*bounds, len(rows) * seq_len], dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids), labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids), cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()), num_supervised=num_supervised, num_supervised_in_step=num_supervised,
        last_in_step=True, num_bytes=_bytes(input_ids, labels, position_ids, token_bytes), num_tokens=num_tokens,
        num_tokens_in_step=num_tokens, idle=not num_supervised)


def _bytes(input_ids: np.ndarray, labels: np.ndarray, position_ids: np.ndarray, token_bytes: np.ndarray) -> int:
    """UTF-8 bytes of the supervised tokens; a token after an initial control token begins a text."""
    is_supervised = labels != IGNORE_INDEX
    first = is_supervised & (position_ids == 1)
    first[:, 1:] &= token_bytes[0][input_ids[:, :-1]] == 0
    return int(token_bytes[0][labels[is_supervised & ~first]].sum() + token_bytes[1][labels[first]].sum())


class RowLoader:
    """Batches of one rank, in complete accumulation windows.

    An epoch consists of all packed sequences (rows) in shuffled order, split into accumulation windows of `G = world *
    accumulate * batch_size`; each window is a step, whose rows `deal` distributes. So 1, 2 or 4 processes compute the
    same rows in the same step if G is the same. The last window has the remaining rows: nothing is dropped, all ranks
    have the same number of micro-batches, and `num_supervised_in_step` counts the actual tokens. So an epoch consists
    of whole steps for Lightning and DeepSpeed, which count partial windows differently. Rows without a supervised token
    belong to their step but are not computed: they have no gradient and do not contribute to metrics.

    An iteration yields `len(self)` batches from the current state, across the end of an epoch if necessary; without
    `shuffle` (evaluation) it always starts at the beginning and has no state.

    Args:
        corpus: The corpus with the tokens.
        rows: The packed sequences, with their supervised tokens counted.
        batch_size: Packed sequences per micro-batch and rank.
        seq_len: Tokens per packed sequence.
        pad_id: Padding token; never supervised.
        token_bytes: (2, V) bytes of each token, and of a text's first one, for `num_bytes`.
        seed: Seed of the order.
        rank: This process, of `world`.
        world: Number of processes.
        accumulate: Micro-batches per step.
        shuffle: Whether each epoch has its own order.
        trim: Pad to the longest packed sequence of the batch, not to `seq_len`.
        fingerprint: Identity of the data by named parts; a checkpoint of other data is refused.
        draw: Function epoch -> packed sequences if they differ between epochs: as many as `rows`, those of the first.
        token_sizes: (4, V) `token_bytes` and the same in characters: batches then say to which document, answer and
            position each supervised token belongs (`cells.py`). Null for training, which needs none of it.
    """

    def __init__(self, corpus: Corpus, rows: Rows, *, batch_size: int, seq_len: int, pad_id: int,
                 token_bytes: np.ndarray, seed: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1,
                 shuffle: bool = True, trim: bool = False, fingerprint: object = "",
                 draw: Callable[[int], Rows] | None = None, token_sizes: np.ndarray | None = None) -> None:
        self.corpus, self.rows, self._draw = corpus, rows, draw
        self.batch_size, self.seq_len, self.pad_id, self.token_bytes = batch_size, seq_len, pad_id, token_bytes
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate
        self.shuffle, self.trim, self.fingerprint = shuffle, trim, fingerprint
        self.token_sizes, self.sources = token_sizes, short_names(corpus.names)
        self.rows_per_step = world * accumulate * batch_size
        self._done = 0                                  # micro-batches yielded since the first epoch
        self._epoch = lru_cache(maxsize=2)(self._ordered)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return math.ceil(len(self.rows) / self.rows_per_step) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        begin = self._done if self.shuffle else 0
        for number in range(begin, begin + len(self)):
            batch = self.batch(number)
            if self.shuffle:                            # before the yield: Lightning saves while it processes this
                self._done = number + 1                 # batch, and does not return here after the last one
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
        if self.token_sizes is not None:
            table, of_token = cells_of(self.corpus, [segment for row in mine.tolist() for segment in rows.row(row)],
                                       self.token_sizes)
            batch |= {"cells": torch.from_numpy(table), "cell_of_token": torch.from_numpy(of_token),
                      "sources": self.sources}
        return batch

    def alone(self, number: int) -> Iterator[tuple[str, Batch]]:
        """Each segment of a micro-batch as a separate batch, with the place of its record."""
        rows, _, _ = self._epoch(number // len(self))
        window, share = self._share(number)
        for row in window[share.start:share.stop].tolist():
            for segment in range(int(rows.offsets[row]), int(rows.offsets[row + 1])):
                one = rows.segments[np.array([segment])]
                yield self.corpus.place(int(one.sequence[0])), collate(
                    self.corpus, Rows(one, np.array([0, 1]), np.zeros(1, np.int64), np.zeros(1, np.int64)), [0],
                    seq_len=max(2, int(one.lengths[0])), pad_id=self.pad_id, token_bytes=self.token_bytes)

    def _share(self, number: int) -> tuple[np.ndarray, Share]:
        """Indices of the packed sequences of a micro-batch's step, and this rank's share of them."""
        epoch, within = divmod(number, len(self))
        step, micro = divmod(within, self.accumulate)
        rows, _, order = self._epoch(epoch)
        window = order[step * self.rows_per_step:(step + 1) * self.rows_per_step]
        window = window[rows.supervised[window] > 0]
        return window, deal(len(window), micro, rank=self.rank, world=self.world, accumulate=self.accumulate,
                            batch_size=self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Indices of an epoch's packed sequences in the order in which they are drawn."""
        return self._epoch(epoch)[2]

    def _ordered(self, epoch: int) -> tuple[Rows, np.ndarray, np.ndarray]:
        """An epoch's packed sequences, their lengths, and their order; equal on all ranks."""
        rows = self._draw(epoch) if self._draw else self.rows
        count = len(rows)
        assert count == len(self.rows), "all epochs of a run have the same number of packed sequences"
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        return rows, rows.lengths, order

    # ---- what was drawn ----------------------------------------------------------------------------------------------

    @property
    def ledger(self) -> Tally:
        """Totals of what all ranks have drawn of each source so far."""
        return self.drawn(self._done)

    def drawn(self, batches: int) -> Tally:
        """Totals of each source that all ranks draw in a number of micro-batches since the first epoch.

        A function of the number only, so it is correct after a resume and equal on all ranks.
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
        """Micro-batches yielded since the first epoch."""
        return self._done

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position of the run; equal on all ranks, because DDP and ZeRO store only that of rank 0."""
        return {"epoch": self._done // len(self), "batches": self._done, "accumulate_grad_batches": self.accumulate,
                **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next batch; between two steps the division into micro-batches may change.

        The numbers of processes and micro-batches and the batch size may change if a step has as many packed sequences
        as before.

        Raises:
            InputError: The state belongs to other data or steps; the error names the differences.
        """
        saved = int(state.get("accumulate_grad_batches", self.accumulate))
        steps, within = divmod(int(state.get("batches", 0)), saved)
        identity = self._identity() | ({"accumulate_grad_batches": self.accumulate} if within else {})
        differs = [f"{key} was {state.get(key)} and is {value}" for key, value in identity.items()
                   if key != "data" and state.get(key) != value]
        differs = differences(state.get("data"), self.fingerprint) + differs
        if differs:
            raise InputError("the checkpoint cannot continue on these batches: " + "; ".join(differs), where="data",
                             fix="Use the same data and settings, or start a new run from its weights; rows_per_step "
                             "is batch_size * accumulate_grad_batches * devices.")
        self._done = steps * self.accumulate + within

    def _identity(self) -> dict[str, Any]:
        return {"data": self.fingerprint, "seed": self.seed, "rows_per_step": self.rows_per_step}
