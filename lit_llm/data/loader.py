"""Rows of a corpus in, batches out, in an order that is a function of (seed, epoch) and can be resumed anywhere.

Not a torch DataLoader: Lightning takes any iterable with a length, saves its `state_dict` and gives it back. Knows of
ranks and accumulation only as numbers; nothing of text or devices.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import torch

from lit_llm.data.packing import Rows, Segments
from lit_llm.data.store import DOCUMENT, TokenStore
from lit_llm.errors import InputError
from lit_llm.tokenizer import IGNORE_INDEX

EMPTY = -1                                              # a row of padding alone


class Batch(TypedDict):
    """One micro-batch of one rank, on the CPU; B rows, T tokens.

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


class Corpus:
    """Several stores as one list of N sequences; a sequence may be in it twice, as a mixture's weights want.

    Args:
        draws: Of each store, which of its sequences, in what order.
        end: Whether documents keep their end-of-text token: so in training; not in evaluation, which scores the text.
    """

    def __init__(self, draws: Sequence[tuple[TokenStore, np.ndarray]], *, end: bool = True) -> None:
        self.stores = [store for store, _ in draws]
        self.store_of = np.repeat(np.arange(len(draws)), [len(which) for _, which in draws])
        self.index = np.concatenate([which for _, which in draws] or [np.empty(0, np.int64)])
        self.lengths, self.learned = np.zeros(len(self.index), np.int64), np.zeros(len(self.index), np.int64)
        self.is_document = np.zeros(len(self.index), bool)
        for number, (store, which) in enumerate(draws):
            here, rows = self.store_of == number, store.sequences[which]
            without = 0 if end else rows["ended"].astype(np.int64)
            self.lengths[here] = rows["length"] - without
            self.learned[here] = rows["supervised"] - without
            self.is_document[here] = rows["kind"] == DOCUMENT

    def __len__(self) -> int:
        return len(self.index)

    def read(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start:stop` of a sequence, and whether each is supervised."""
        tokens, marks = self.marked(sequence, start, stop)
        return tokens, (marks & 1).view(bool)

    def marked(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `start:stop` of a sequence, and their marks as the store keeps them."""
        store = self.stores[self.store_of[sequence]]
        first = int(store.sequences["offset"][self.index[sequence]])
        part = slice(first + start, first + stop)
        return store.tokens[part], store.marks[part]

    def count(self, segments: Segments) -> np.ndarray:
        """(S,) supervised tokens of each segment beyond its first: all of a document, else looked up where cut."""
        counts = segments.lengths - 1
        talk = np.flatnonzero(~self.is_document[segments.sequence])
        counts[talk] = self.learned[segments.sequence[talk]]
        cut = talk[segments.lengths[talk] != self.lengths[segments.sequence[talk]]]
        for segment in cut.tolist():
            place = (int(values[segment]) for values in (segments.sequence, segments.start, segments.stop))
            counts[segment] = int(self.read(*place)[1][1:].sum())
        return counts

    def place(self, sequence: int) -> str:
        """Where the record of a sequence stands."""
        return self.stores[self.store_of[sequence]].place(int(self.index[sequence]))


def collate(corpus: Corpus, rows: Rows, numbers: Sequence[int], *, seq_len: int, pad_id: int,
            token_bytes: np.ndarray) -> Batch:
    """The rows of these numbers side by side, padded to `seq_len`; `EMPTY` is a row of padding.

    The step's totals are this batch's own until a loader that knows the step sets them.
    """
    shape = (len(numbers), seq_len)
    input_ids, position_ids = np.full(shape, pad_id, np.int64), np.empty(shape, np.int64)
    labels = np.full(shape, IGNORE_INDEX, np.int64)
    counting = np.arange(seq_len)
    bounds: list[int] = []
    num_tokens = 0
    for place, number in enumerate(numbers):
        at = 0
        for sequence, start, stop in rows.row(number) if number != EMPTY else ():
            ids, supervised = corpus.read(sequence, start, stop)
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
    cu_seqlens = np.array([*bounds, len(numbers) * seq_len], dtype=np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids), labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids), cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()), num_supervised=len(learned), num_supervised_in_step=len(learned),
        last_in_step=True, num_bytes=int(token_bytes[learned].sum()), num_tokens=num_tokens)


class RowLoader:
    """Batches of one rank, whole accumulation windows only.

    An epoch is the rows in shuffled order, cut into windows of `G = world * accumulate * batch_size`; in a window,
    micro-batch m of rank r takes `batch_size` rows from `(m * world + r) * batch_size`. So 1, 2 or 4 processes see the
    same rows in the same step while G is the same. The last window is filled with empty rows: nothing is dropped, no
    rank ever has one micro-batch less, and `num_supervised_in_step` counts what is really there.

    An iteration yields `len(self)` batches from where the state stands, over the end of the epoch if it must;
    without `shuffle` (evaluation) it always begins at the beginning and has no state to keep.

    Args:
        corpus: Where tokens lie.
        rows: What rows are made of, with their supervised tokens counted.
        batch_size: Rows per micro-batch and rank.
        seq_len: Tokens of a row.
        pad_id: Fills the rest of a row; never supervised.
        token_bytes: (V,) bytes of each token, for `num_bytes`.
        seed: Of the order.
        rank: This process, of `world`.
        world: Processes that share each step.
        accumulate: Micro-batches of a step.
        shuffle: Whether an epoch has an order of its own.
        trim: Pad to the longest row of the batch, not to `seq_len`.
        fingerprint: Of data and plan; a checkpoint of another one is refused.
    """

    def __init__(self, corpus: Corpus, rows: Rows, *, batch_size: int, seq_len: int, pad_id: int,
                 token_bytes: np.ndarray, seed: int = 0, rank: int = 0, world: int = 1, accumulate: int = 1,
                 shuffle: bool = True, trim: bool = False, fingerprint: str = "") -> None:
        self.corpus, self.rows, self.lengths = corpus, rows, rows.lengths
        self.batch_size, self.seq_len, self.pad_id, self.token_bytes = batch_size, seq_len, pad_id, token_bytes
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate
        self.shuffle, self.trim, self.fingerprint = shuffle, trim, fingerprint
        self.rows_per_step = world * accumulate * batch_size
        self._done = 0                                  # micro-batches handed out since the first epoch
        self._order = lru_cache(maxsize=2)(self._permuted)

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
        window, mine = self._share(number)
        real = mine[mine != EMPTY]
        width = max(int(self.lengths[real].max(initial=0)), 2) if self.trim else self.seq_len
        batch = collate(self.corpus, self.rows, mine.tolist(), seq_len=width, pad_id=self.pad_id,
                        token_bytes=self.token_bytes)
        assert batch["num_supervised"] == int(self.rows.supervised[real].sum())
        batch["num_supervised_in_step"] = int(self.rows.supervised[window[window != EMPTY]].sum())
        batch["last_in_step"] = number % self.accumulate == self.accumulate - 1
        return batch

    def alone(self, number: int) -> Iterator[tuple[str, Batch]]:
        """Each segment of a micro-batch as a batch of its own, with the place of its record."""
        _, mine = self._share(number)
        for row in mine[mine != EMPTY].tolist():
            for segment in range(int(self.rows.offsets[row]), int(self.rows.offsets[row + 1])):
                one = self.rows.segments[np.array([segment])]
                rows = Rows(one, np.array([0, 1]), np.zeros(1, np.int64))
                yield self.corpus.place(int(one.sequence[0])), collate(
                    self.corpus, rows, [0], seq_len=max(2, int(one.lengths[0])), pad_id=self.pad_id,
                    token_bytes=self.token_bytes)

    def _share(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of the whole step that a micro-batch is part of, and those that are this rank's in it."""
        epoch, within = divmod(number, len(self))
        step, micro = divmod(within, self.accumulate)
        window = self._order(epoch)[step * self.rows_per_step:(step + 1) * self.rows_per_step]
        at = (micro * self.world + self.rank) * self.batch_size
        return window, window[at:at + self.batch_size]

    def _permuted(self, epoch: int) -> np.ndarray:
        """Row numbers of an epoch, filled to whole windows; 8 bytes a row, the same on all ranks."""
        count = len(self.rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        return np.concatenate([order, np.full(-count % self.rows_per_step, EMPTY, dtype=order.dtype)])

    @property
    def position(self) -> int:
        """Micro-batches handed out since the first epoch."""
        return self._done

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands; equal on all ranks, since DDP and ZeRO keep only that of rank 0."""
        return {"epoch": self._done // len(self), "batches": self._done, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the very next batch.

        Raises:
            InputError: The state belongs to other data or another division into batches; it names what differs.
        """
        differs = [f"{key} was {state.get(key)} and is {value}" for key, value in self._identity().items()
                   if state.get(key) != value]
        if differs:
            raise InputError("the checkpoint cannot continue on these batches: " + "; ".join(differs),
                             where="data", fix="Give the same data and settings, or start a new run from its weights.")
        self._done = int(state["batches"])

    def _identity(self) -> dict[str, Any]:
        return {"data": self.fingerprint, "seed": self.seed, "processes": self.world,
                "accumulate_grad_batches": self.accumulate, "batch_size": self.batch_size}
