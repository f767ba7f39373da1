"""The texts of an evaluation as windows of tokens, in batches, and what is known of each document.

A unit is a document or a conversation: one record of a source. Intervals are taken over units. A unit has one window,
or several if it is longer than a window; each of its supervised tokens is scored in exactly one of them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from lit_llm.data.datamodule import TextDataModule
from lit_llm.data.records.sources import Source
from lit_llm.data.rows.cells import Cells, cells_of
from lit_llm.data.rows.packing import Rows, pack
from lit_llm.data.rows.plan import Plan
from lit_llm.errors import InputError
from lit_llm.evaluation.scoring.subject import config_of
from lit_llm.text.tokenizer import Tokenizer

AT_ONCE = 256                                       # windows whose tokens are counted together
EXCERPT = 160                                       # characters
OF_TOKENIZER = ("tokenizer", "chat_template", "template_args")      # keys of a run that its tokenizer's folder contains
OF_TRAINING = ("sources", "val_fraction", "val_sources", "test_sources", "test_fraction", "train_on", "seq_len",
               "packing", "overlong", "on_bad_record", "seed", "cache_dir", "num_proc", "bad_record_limit", "stride")


class Window(NamedTuple):
    """Consecutive tokens of a unit that are computed together.

    Args:
        unit: Index of its document or conversation.
        ids: (T,) token ids.
        supervised: (T,) bool, whether each token is scored; never the first one, which has no context.
        number: Its index among the windows of the material.
    """

    unit: int
    ids: np.ndarray
    supervised: np.ndarray
    number: int


@dataclass(frozen=True, slots=True)
class Units:
    """What is known of each of U units before a model sees them.

    Args:
        sources: Names of the sources.
        source: (U,) index of its source.
        content: (U,) uint64 hash of its content, independent of the tokenizer.
        tokens: (U,) scored tokens.
        bytes: (U,) UTF-8 bytes of the text that they spell; of the whole text where words are counted.
        characters: (U,) characters of the same text.
        words: (U,) words of the whole text, in the convention of the literature; null where it does not apply.
    """

    sources: list[str]
    source: np.ndarray
    content: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    characters: np.ndarray
    words: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.source)


@dataclass
class Material:
    """Texts as windows for one tokenizer.

    Args:
        tokenizer: The tokenizer.
        units: What is known of each unit.
        rows: Packed sequences of windows.
        window: Function segment -> its window.
        width: Tokens of the longest packed sequence.
        settings: What determines the windows, by name, for comparisons and for the result.
        places: Function unit -> place of its record.
        text: Function unit -> its text.
        notes: Numbers of records that were cut, dropped or set aside.
        last_position: The highest position that the model may see; null for no limit. A window may have one token more,
            which is only predicted.
        cells: Function windows -> the document, answer and position of each of their scored tokens; null where these
            are not told apart.
    """

    tokenizer: Tokenizer
    units: Units
    rows: Rows
    window: Callable[[int], Window]
    width: int
    settings: dict[str, Any]
    places: Callable[[int], str]
    text: Callable[[int], str]
    notes: dict[str, int] = field(default_factory=dict)
    last_position: int | None = None
    cells: Callable[[Sequence[Window]], Cells] | None = None

    def batches(self, size: int) -> Iterator[list[list[Window]]]:
        """Batches of at most `size` packed sequences, each a list of its windows."""
        ends = self.rows.offsets.tolist()
        for start in range(0, len(self.rows), size):
            yield [[self.window(segment) for segment in range(ends[row], ends[row + 1])]
                   for row in range(start, min(start + size, len(self.rows)))]

    @property
    def read(self) -> int:
        """Tokens of all windows, with those that are only context."""
        return int(self.rows.segments.lengths.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the texts and of how they are cut and masked; independent of the tokenizer."""
        digest = sha256(self.units.content.tobytes() + self.units.source.astype("<i8").tobytes())
        digest.update(repr(sorted(self.settings.items())).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def tokens_fingerprint(self) -> str:
        """Identity of the scored tokens: equal for two tokenizers that give the same tokens and masks."""
        digest = sha256()
        for unit in (self.window(segment) for segment in range(len(self.rows.segments))):
            digest.update(unit.ids.astype("<i4").tobytes() + unit.supervised.tobytes())
        return digest.hexdigest()[:16]

    def excerpt(self, unit: int) -> str:
        """The beginning of a unit's text on one line; control characters are escaped.

        The text of a file could otherwise move the cursor or reorder what a terminal shows.
        """
        return escaped(self.text(unit)[:EXCERPT])


def escaped(text: str) -> str:
    r"""A text in one line in which every character that is not printable is escaped.

    >>> escaped("two\nlines, \x1b[31mred")
    'two\\nlines, \\x1b[31mred'
    """
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode()
                   for character in text)


# ---- where the texts come from ---------------------------------------------------------------------------------------

@dataclass(frozen=True, slots=True)
class Texts:
    """Sources and how to read them, before a tokenizer is known.

    Args:
        options: Arguments of `TextDataModule` that determine what is validated.
        limit: Only this many units, from the beginning; null for all.
    """

    options: dict[str, Any]
    limit: int | None = None

    def with_tokenizer(self, tokenizer: str, seq_len: int) -> Material:
        """Tokenize the texts, or open what is in the token cache.

        Args:
            tokenizer: Folder or hub id.
            seq_len: Tokens of a window, unless the options have another number.

        Raises:
            InputError: A source cannot be read, or has a bad record.
        """
        data = TextDataModule(**{"seq_len": seq_len} | self.options, tokenizer=tokenizer)
        data.quiet = True
        if data.val_sources:                        # otherwise a share of the training data is held out
            data.sources = data.val_sources
        data.prepare_data()
        data.setup("validate")
        if "val" not in data.plans:
            raise InputError("the run has no validation data", where="data", fix="give texts: --data FILE")
        return _of_plan(data, data.plans["val"], self.limit)


def of_paths(paths: Sequence[str], *, limit: int | None, format: str, columns: dict[str, str] | None, document: str,
             split: str, **options: Any) -> Texts:
    """Texts that the user names."""
    sources = [Source(path, format=format, columns=columns or {}, document=document, split=split) for path in paths]
    return Texts({"sources": sources, "val_sources": sources, **options}, limit)


def of_run(run: Any, *, limit: int | None, **options: Any) -> Texts:
    """The validation data of a run, read as the run reads them.

    Args:
        run: The run folder.
        limit: As in `Texts`.
        options: Settings that replace those of the run; null keeps them.

    Raises:
        InputError: The run used a data module of another package, or its config is damaged.
    """
    listed = config_of(run).get("data") or {}
    if named := listed.get("class_path"):
        if str(named).rpartition(".")[2] != TextDataModule.__name__:
            raise InputError(f"the run's data come from {named}, which is not read here", where="data",
                             fix="give texts: --data FILE")
        listed = listed.get("init_args") or {}
    options_of_run = {key: value for key, value in listed.items() if key in OF_TRAINING}
    try:
        for key in ("sources", "val_sources"):
            options_of_run[key] = [Source(**source) for source in options_of_run.get(key) or ()] or None
    except TypeError as error:
        raise InputError(f"data.{key} of the run cannot be read: {error}", where=str(run / "config.yaml")) from None
    return Texts(options_of_run | {key: value for key, value in options.items() if value is not None}, limit)


def _of_plan(data: TextDataModule, plan: Plan, limit: int | None) -> Material:
    corpus, tokenizer = plan.corpus, data.tokenizer
    keys = np.stack([corpus.store_of, corpus.record_of(np.arange(len(corpus)))], axis=1)
    known, first, unit_of = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    unit_of, rows = unit_of.reshape(-1), plan.rows
    if limit is not None and limit < len(first):
        first, known = first[:limit], known[:limit]
        rows = pack(rows.segments[unit_of[rows.segments.sequence] < limit], seq_len=data.seq_len, packing="best_fit")
    segments = rows.segments
    places = np.stack([segments.sequence, segments.start, segments.stop], axis=1).tolist()

    def window(number: int) -> Window:
        sequence, start, stop = places[number]
        ids, supervised = corpus.read(sequence, start, stop)
        mask = np.array(supervised, dtype=bool)
        mask[:1] = False
        return Window(int(unit_of[sequence]), ids, mask, number)

    def cells(windows: Sequence[Window]) -> Cells:
        return cells_of(corpus, [tuple(places[each.number]) for each in windows], tokenizer.token_sizes)

    def text(unit: int) -> str:
        sequence = int(first[unit])
        return tokenizer.decode(corpus.read(sequence, 0, min(int(corpus.lengths[sequence]), 4 * EXCERPT))[0].tolist(),
                                skip_special_tokens=False)

    sums = np.zeros((len(first), 3), np.int64)          # scored tokens, their bytes and characters
    for start in range(0, len(places), AT_ONCE):
        table = cells_of(corpus, list(map(tuple, places[start:start + AT_ONCE])), tokenizer.token_sizes).table
        of_cell = np.searchsorted(_number(known[:, 0], known[:, 1]), _number(table[:, 1], table[:, 0]))
        np.add.at(sums, of_cell, table[:, 4:7].astype(np.int64))
    units = Units(list(corpus.names), corpus.store_of[first], corpus.column("content")[first], *sums.T)
    settings = {"train_on": data.train_on, "seq_len": data.seq_len, "overlong": data.overlong,
                "stride": data.stride or data.seq_len - 1}
    counts = {"cut": plan.notes.get("cut", 0), "dropped": plan.notes.get("dropped_overlong", 0),
              "set aside": sum(report.quarantined for report in data.reports)}
    return Material(tokenizer, units, rows, window, data.seq_len, settings,
                    lambda unit: corpus.place(int(first[unit])), text,
                    {name: count for name, count in counts.items() if count}, cells=cells)


def _number(source: np.ndarray, record: np.ndarray) -> np.ndarray:
    """One number for each record of all sources, in their order."""
    return source.astype(np.int64) << 48 | record.astype(np.int64)
