"""Collect what a user should see of a run's data: the first rows as the model reads them, and counts of all rows.

How they are shown is `terminal.py`'s and `page.py`'s.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lit_llm import names
from lit_llm.data.interface import Data
from lit_llm.data.records.formats import OPEN_NOTE
from lit_llm.data.rows.corpus import Corpus, Tally
from lit_llm.data.rows.loader import RowLoader
from lit_llm.data.rows.packing import Rows
from lit_llm.data.rows.plan import Plan
from lit_llm.data.tokens.store import CONTROLS, Report, TokenStore
from lit_llm.text.tokenizer import SPEAKERS, Tokenizer

BINS = 12
NOTES = {                                               # of `Plan.notes`, in words
    "duplicates": "records that say exactly what an earlier one says",
    "duplicates_left_out": "left out: they say exactly what an earlier one says",
    "cut": "longer than a row and cut",
    "cut_in_an_answer": "of them cut in an answer, whose stop token is lost",
    "dropped_overlong": "left out: longer than a row",
    "dropped_nothing_left": "left out: no token is learned in what fits a row",
    "also_in_train": "records that are exact duplicates of training records",
}


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of one speaker's tokens, spelled; control characters are replaced.

    Args:
        text: What it says.
        speaker: Who says it, of SPEAKERS.
        learned: Whether it is.
        special: Whether it is control tokens.
    """

    text: str
    speaker: str
    learned: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One segment of a row.

    Args:
        place: Where its record stands.
        start: The first of its tokens, counted from the record's first.
        stop: Behind the last of them.
        length: Tokens of the whole sequence.
        learned: Tokens learned here.
        runs: What it says.
    """

    place: str
    start: int
    stop: int
    length: int
    learned: int
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the data, counted.

    Args:
        name: train, val or test.
        sequences: Conversations and documents.
        rows: Of `seq_len` tokens, in an epoch.
        tokens: In all rows, padding not counted.
        supervised: Of them.
        padding: Share of the rows that is padding.
        notes: What was cut, dropped, or is there more than once.
        drawn: What an epoch draws of each source.
        lengths: (edges, counts) of the sequences' tokens, `edges[i] <= length < edges[i + 1]`; the last count is of
            those longer than a row.
        spread: The shortest, median and longest sequence, in tokens.
    """

    name: str
    sequences: int
    rows: int
    tokens: int
    supervised: int
    padding: float
    notes: dict[str, int]
    drawn: Tally
    lengths: tuple[list[int], list[int]]
    spread: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Pace:
    """Optimizer steps.

    Args:
        rows: Of a step, over all processes and micro-steps.
        epoch: Steps of an epoch.
        last: Rows of an epoch's last step.
        run: Steps of the run; 0 where its length is not counted in steps.
    """

    rows: int
    epoch: int
    last: int
    run: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that `inspect` shows.

    Args:
        reports: Of each source, its records.
        stages: Of each stage, its sequences and rows.
        shown: The first training rows, each as its segments.
        findings: What looks wrong.
        seq_len: Tokens of a row.
        pace: Steps.
        note: What was chosen for the user's tokenizer, where it lacks a chat template.
    """

    reports: list[Report]
    stages: list[Stage]
    shown: list[list[Shown]]
    findings: list[str]
    seq_len: int
    pace: Pace | None
    note: str = ""


def examine(data: Data, rows: int = 0) -> Inspection:
    """Look at data that has been set up.

    Args:
        data: Its plans are made.
        rows: How many training rows to show, as the first epoch draws them.
    """
    stages = [_stage(name, plan, data.seq_len) for name, plan in data.plans.items()]
    train = data.plans.get("train")
    order = _first(data, rows) if train and rows else []
    shown = [_row(train.corpus, train.rows, number, data.tokenizer) for number in order] if train else []
    pace = _pace(len(train.rows), data.batch_size, data.trainer) if train and not data.streaming else None
    stores = [store for plan in data.plans.values() for store in plan.stores]
    talks = any(not plan.corpus.is_document.all() for plan in data.plans.values())
    note = f"{data.tokenizer.note}; where a base never saw them, LoRA trains their rows too"
    note = note if talks and data.tokenizer.note else ""
    findings = [*([note] if note else []), *_unsound(stores), *_doubtful(stages, data.seq_len)]
    return Inspection(data.reports, stages, shown, list(dict.fromkeys(findings)), data.seq_len, pace, note)


def _first(data: Data, rows: int) -> list[int]:
    """Numbers of the first rows that are drawn; of a stream, those of its first chunk."""
    loader = data.train_dataloader()
    return loader.order(0)[:rows].tolist() if isinstance(loader, RowLoader) else [
        *range(min(rows, len(data.plans["train"].rows)))]


def _stage(name: str, plan: Plan, seq_len: int) -> Stage:
    corpus, rows = plan.corpus, plan.rows
    tokens, longest = int(rows.lengths.sum()), int(corpus.lengths.max())
    top = min(seq_len, longest)
    edges = np.unique(np.linspace(1, top + 1, BINS + 1).round().astype(int)).tolist()
    counts = np.histogram(corpus.lengths, bins=[*edges, math.inf])[0]
    return Stage(name, len(corpus), len(rows), tokens, int(rows.supervised.sum()), 1 - tokens / (len(rows) * seq_len),
                 plan.notes, corpus.named(corpus.tally(rows)), (edges, counts.tolist()),
                 (int(corpus.lengths.min()), int(np.median(corpus.lengths)), longest))


def _pace(rows: int, batch_size: int, trainer: Any) -> Pace:
    """As the loader and Lightning will count."""
    accumulate, limit = (trainer.accumulate_grad_batches, trainer.limit_train_batches) if trainer else (1, 1.0)
    each = batch_size * accumulate * (trainer.world_size if trainer else 1)
    batches = math.ceil(rows / each) * accumulate
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps, last = math.ceil(batches / accumulate), (rows - 1) % each + 1
    epochs, most = (trainer.max_epochs, trainer.max_steps) if trainer else (None, -1)
    limits = [*([epochs * steps] if epochs and epochs > 0 else []), *([most] if most > 0 else [])]
    return Pace(each, steps, last, min(limits, default=0))


def _row(corpus: Corpus, rows: Rows, number: int, tokenizer: Tokenizer) -> list[Shown]:
    """The segments of a row; of each, stretches of one speaker that are learned or not, control tokens apart."""
    segments = []
    for sequence, start, stop in rows.row(number):
        ids, marks = corpus.marked(sequence, start, stop)
        marks = marks.copy()
        marks[0] &= 0xFE                                # nothing stands before it to predict it from
        special = np.isin(ids, list(tokenizer.special_ids))
        kinds = marks.astype(np.int64) << 1 | special
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
        runs = [Run(tokenizer.decode(ids[begin:end], skip_special_tokens=False).translate(CONTROLS),
                    SPEAKERS[marks[begin] >> 1], bool(marks[begin] & 1), bool(special[begin]))
                for begin, end in itertools.pairwise(cuts)]
        segments.append(Shown(names.shown(corpus.place(sequence)), start, stop, int(corpus.lengths[sequence]),
                              int((marks & 1).sum()), runs))
    return segments


def _unsound(stores: Sequence[TokenStore]) -> Iterator[str]:
    """What is wrong with records."""
    for report, folder in ((store.report, store.folder) for store in stores):
        if report.stopless:
            yield (f"{report.source}: {report.stopless:,} conversations teach no stop token; a model trained on them "
                   "does not learn to stop")
        if report.double_bos:
            yield f"{report.source}: {report.double_bos:,} sequences begin with two BOS tokens"
        if left := report.notes.get(OPEN_NOTE):
            yield f"{report.source}: in {left:,} records {OPEN_NOTE}; the model learns to say it so"
        if report.quarantined:
            yield (f"{report.source}: {report.quarantined:,} bad records were set aside, with their reasons, in "
                   f"{folder / 'quarantine.jsonl'}")


def _doubtful(stages: Sequence[Stage], seq_len: int) -> Iterator[str]:
    """What may not be meant."""
    for stage in stages:
        if count := stage.notes.get("duplicates"):
            yield f"{stage.name}: {count:,} records say exactly what an earlier one says; data.dedup leaves them out"
        if count := stage.notes.get("also_in_train"):
            yield (f"{stage.name}: {count:,} records are exact duplicates of training records, so its figures "
                   "will be too good")
        if (count := stage.notes.get("cut", 0)) > stage.sequences // 20:
            lost = stage.notes.get("cut_in_an_answer", 0)
            yield (f"{stage.name}: {count / stage.sequences:.0%} of the sequences are longer than {seq_len:,} tokens "
                   f"and cut, {lost:,} of them in an answer; the longest has {stage.spread[2]:,} tokens (data.seq_len)")
        if stage.padding > 0.2 and stage.name == "train":
            yield f"{stage.name}: {stage.padding:.0%} of the rows is padding; data.packing: best_fit wastes less"
