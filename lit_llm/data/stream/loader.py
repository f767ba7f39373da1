"""Collate the packed sequences of a stream into batches; the state is equal on all ranks, for any number of ranks.

The counterpart of `loader.RowLoader` for a corpus that is never in memory as a whole. Ranks and accumulation are plain
numbers here.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lit_llm.data.rows.loader import Batch, batch_of, deal
from lit_llm.data.stream.chunks import Chunk, Position, Stream
from lit_llm.data.stream.feed import Cursor
from lit_llm.data.stream.memory import Memory
from lit_llm.data.tokens.encode import SEQUENCE
from lit_llm.errors import InputError

COUNTED = ("sequences", "tokens", "supervised")


@dataclass(frozen=True, slots=True)
class Row:
    """One packed sequence of a chunk.

    Args:
        segments: Tokens of each segment, and whether each is supervised.
        counts: (S, 4), as in a chunk.
        length: Number of tokens.
    """

    segments: list[tuple[np.ndarray, np.ndarray]]
    counts: np.ndarray
    length: int


class StreamLoader:
    """Batches of one rank, in `steps` complete accumulation windows per epoch.

    The order of packed sequences (rows) is a function of the stream, and a step takes the next
    `G = world * accumulate * batch_size` of them, distributed as in `RowLoader`. Each rank reads all of them, so the
    supervised tokens of a step are known without communication.

    Args:
        stream: The stream of packed sequences.
        steps: Optimizer steps per epoch, because Lightning needs a length.
        batch_size: Packed sequences per micro-batch and rank.
        pad_id: Padding token; never supervised.
        token_bytes: (2, V) bytes of each token, and of a text's first one.
        rank: This process, of `world`.
        world: Number of processes.
        accumulate: Micro-batches per step.
        trim: Pad to the longest packed sequence of the batch, not to the full length.
        identity: Identity of data and settings by named parts; a checkpoint of other data is refused.
    """

    def __init__(self, stream: Stream, *, steps: int, batch_size: int, pad_id: int, token_bytes: np.ndarray,
                 rank: int = 0, world: int = 1, accumulate: int = 1, trim: bool = False,
                 identity: dict[str, Any] | None = None) -> None:
        self.stream, self.steps, self.batch_size = stream, steps, batch_size
        self.pad_id, self.token_bytes, self.rank, self.world = pad_id, token_bytes, rank, world
        self.accumulate, self.trim, self.identity = accumulate, trim, dict(identity or {})
        self._at = (stream.beginning, 0, 0)             # chunk of the window, its first row, yielded micro-batches
        self._drawn = np.zeros((len(stream.paths), len(COUNTED)), dtype=np.int64)

    def __len__(self) -> int:
        """Micro-batches of an epoch."""
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        begin, first, done = self._at
        rows = self._rows(begin, first)
        for _ in range(self.steps + bool(done)):
            window, next_position = [], (begin, first)
            for _ in range(self.world * self.accumulate * self.batch_size):
                row, next_position = next(rows)
                window.append(row)
            for micro in range(done, self.accumulate):
                batch = self._batch(window, micro)
                if batch["last_in_step"]:               # before the yield: Lightning saves while it processes this
                    self._at = (*next_position, 0)             # batch, and does not return here after the last one
                    self._drawn = self._drawn + self._counted(window)
                else:
                    self._at = (begin, first, micro + 1)
                yield batch
            (begin, first), done = next_position, 0

    def _rows(self, begin: Position, first: int) -> Iterator[tuple[Row, tuple[Position, int]]]:
        """Yield each packed sequence with the position of the next one."""
        for chunk in self.stream.chunks(begin):
            skip = first if chunk.begin.number == begin.number else 0
            for at, number in enumerate(chunk.order.tolist()[skip:], skip + 1):
                yield _row(chunk, number), (chunk.begin, at)

    def _batch(self, window: list[Row], micro: int) -> Batch:
        supervised = [row for row in window if row.counts[:, 3].any()]
        share = deal(len(supervised), micro, rank=self.rank, world=self.world, accumulate=self.accumulate,
                     batch_size=self.batch_size)
        mine = supervised[share.start:share.stop]
        width = max(2, *(row.length for row in mine)) if self.trim and mine else self.stream.seq_len
        batch = batch_of([row.segments for row in mine], seq_len=width, pad_id=self.pad_id,
                         token_bytes=self.token_bytes)
        assert batch["num_supervised"] == sum(int(row.counts[:, 3].sum()) for row in mine)
        batch["num_supervised_in_step"] = sum(int(row.counts[:, 3].sum()) for row in supervised)
        batch["num_tokens_in_step"] = sum(row.length for row in supervised)
        batch["last_in_step"] = micro == self.accumulate - 1
        batch["idle"] = share.idle
        return batch

    def _counted(self, window: list[Row]) -> np.ndarray:
        counts, drawn = np.concatenate([row.counts for row in window]), np.zeros_like(self._drawn)
        np.add.at(drawn, counts[:, 0], counts[:, 1:])
        return drawn

    @property
    def ledger(self) -> dict[str, dict[str, int]]:
        """Totals of each source in the steps so far, over all ranks."""
        out = {path: dict.fromkeys(COUNTED, 0) for path in self.stream.paths}
        for path, counts in zip(self.stream.paths, self._drawn.tolist(), strict=True):
            for name, count in zip(COUNTED, counts, strict=True):
                out[path][name] += count
        return out

    @property
    def passes(self) -> list[int]:
        """Number of complete passes over each source."""
        return [cursor.turn for cursor in self._at[0].cursors]

    def summary_lines(self) -> list[str]:
        """Summary lines: passes over the sources, and what this process cut, dropped or set aside."""
        lines = [f"train: {path} was read completely {turns:,} times" for path, turns in
                 zip(self.stream.paths, self.passes, strict=True) if turns]
        notes = self.stream.notes | {"bad_records_set_aside": sum(self._at[0].bad)}
        if reasons := [f"{count:,} {name.replace('_', ' ')}" for name, count in notes.items() if count]:
            lines.append(f"train: {', '.join(reasons)}")
        return lines

    # ---- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position of the run: equal on all ranks, plain numbers and text, fewer tokens than `seq_len`."""
        begin, first, done = self._at
        return {"chunk": begin.number, "row": first, "micro": done, "drawn": self._drawn.tolist(),
                "cursors": [asdict(cursor) for cursor in begin.cursors], "kept": list(begin.accepted),
                "bad": list(begin.bad), "held": _as_lists(begin.remainder), **self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the next packed sequence; only its chunk is rebuilt.

        Raises:
            InputError: The state belongs to other data or settings; the error names the differences.
        """
        settings = self._settings()
        if not state.get("micro"):                      # between two steps, the division may change
            settings = {key: value for key, value in settings.items() if key not in ("processes", "batch_size")}
        differs = [f"{key} was {state.get(key)} and is {value}" for key, value in settings.items()
                   if state.get(key) != value]
        if differs:
            raise InputError("the checkpoint cannot continue on this stream: " + "; ".join(differs), where="data",
                             fix="Use the same data and settings, or start a new run from its weights.")
        cursors = tuple(Cursor(**cursor) for cursor in state["cursors"])
        begin = Position(int(state["chunk"]), cursors, tuple(state["kept"]), tuple(state["bad"]),
                         _from_lists(state["held"], self.stream.beginning.remainder))
        self._at = (begin, int(state["row"]), int(state["micro"]))
        self._drawn = np.array(state["drawn"], dtype=np.int64).reshape(self._drawn.shape)

    def _settings(self) -> dict[str, Any]:
        return {"processes": self.world, "batch_size": self.batch_size, "accumulate_grad_batches": self.accumulate,
                **self.identity}


def _row(chunk: Chunk, number: int) -> Row:
    part = slice(chunk.rows.offsets[number], chunk.rows.offsets[number + 1])
    return Row([chunk.corpus.read(*segment) for segment in chunk.rows.row(number)], chunk.counts[part],
               int(chunk.rows.lengths[number]))


def _as_lists(remainder: Memory) -> dict[str, Any]:
    return {"tokens": remainder.tokens.tolist(), "marks": remainder.marks.tolist(), "open": remainder.open,
            "source": remainder.source.tolist(), "begins": remainder.begins.tolist(),
            "sequences": [[int(value) for value in row] for row in remainder.sequences.tolist()]}


def _from_lists(state: dict[str, Any], like: Memory) -> Memory:
    return Memory(np.array(state["tokens"], like.tokens.dtype), np.array(state["marks"], np.uint8),
                  np.array([tuple(row) for row in state["sequences"]], dtype=SEQUENCE),
                  np.array(state["source"], np.int64), np.array(state["begins"], bool), bool(state["open"]))
