"""Collect statistics of a run's data, and the first packed sequences as the model sees them.

`terminal.py` and `page.py` format them.
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
NOTES = {                                               # descriptions of `Plan.notes`
    "duplicates": "records that are exact duplicates of earlier ones",
    "duplicates_left_out": "left out: exact duplicates of earlier records",
    "cut": "longer than data.seq_len and cut",
    "cut_in_an_answer": "of them cut within an answer, whose stop token is lost",
    "dropped_overlong": "left out: longer than data.seq_len",
    "dropped_nothing_left": "left out: no supervised token within data.seq_len",
    "also_in_train": "records that are exact duplicates of training records",
}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens of one speaker as text; control characters are replaced.

    Args:
        text: The text.
        speaker: Source of the tokens, of SPEAKERS.
        supervised: Whether the tokens are supervised.
        special: Whether they are control tokens.
    """

    text: str
    speaker: str
    supervised: bool
    special: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One segment of a packed sequence.

    Args:
        place: Place of its record.
        start: Index of its first token within the record.
        stop: Index after its last token.
        length: Number of tokens of the whole sequence.
        supervised: Number of supervised tokens.
        runs: Its text in runs.
    """

    place: str
    start: int
    stop: int
    length: int
    supervised: int
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Stage:
    """Statistics of one stage of the data.

    Args:
        name: train, val or test.
        sequences: Number of conversations and documents.
        rows: Packed sequences of `seq_len` tokens per epoch.
        tokens: Tokens per epoch, without padding.
        supervised: Supervised tokens among them.
        padding: Share of padding.
        notes: Numbers of cut, dropped and duplicate sequences.
        drawn: Sequences, tokens and supervised tokens that an epoch draws from each source.
        lengths: (edges, counts) of the sequences' tokens, `edges[i] <= length < edges[i + 1]`; the last count is of
            sequences longer than `seq_len`.
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
        rows: Packed sequences per step, over all processes and micro-batches.
        epoch: Steps per epoch.
        last: Packed sequences of an epoch's last step.
        run: Steps of the run; 0 if its length is not known in steps.
    """

    rows: int
    epoch: int
    last: int
    run: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that `inspect` shows.

    Args:
        reports: Report of the records of each source.
        stages: Statistics of each stage.
        shown: The first training sequences, as lists of segments.
        findings: Warnings about the data.
        seq_len: Tokens per packed sequence.
        pace: Optimizer steps.
        note: The chat template chosen for a tokenizer without one.
    """

    reports: list[Report]
    stages: list[Stage]
    shown: list[list[Shown]]
    findings: list[str]
    seq_len: int
    pace: Pace | None
    note: str = ""


def examine(data: Data, rows: int = 0) -> Inspection:
    """Inspect data after setup.

    Args:
        data: The data module after setup.
        rows: Number of training sequences to show, in the order of the first epoch.
    """
    stages = [_stage(name, plan, data.seq_len) for name, plan in data.plans.items()]
    train = data.plans.get("train")
    order = _first(data, rows) if train and rows else []
    shown = [_row(train.corpus, train.rows, number, data.tokenizer) for number in order] if train else []
    pace = _pace(len(train.rows), data.batch_size, data.trainer) if train and not data.streaming else None
    stores = [store for plan in data.plans.values() for store in plan.stores]
    has_conversations = any(not plan.corpus.is_document.all() for plan in data.plans.values())
    note = f"{data.tokenizer.note}; LoRA also trains their embeddings if the base was never trained on them"
    note = note if has_conversations and data.tokenizer.note else ""
    findings = [*([note] if note else []), *_faults(stores), *_doubts(stages, data.seq_len)]
    return Inspection(data.reports, stages, shown, list(dict.fromkeys(findings)), data.seq_len, pace, note)


def _first(data: Data, rows: int) -> list[int]:
    """Indices of the first packed sequences in order; for a stream, those of its first chunk."""
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
    """Steps as the loader and Lightning count them."""
    accumulate, limit = (trainer.accumulate_grad_batches, trainer.limit_train_batches) if trainer else (1, 1.0)
    rows_per_step = batch_size * accumulate * (trainer.world_size if trainer else 1)
    batches = math.ceil(rows / rows_per_step) * accumulate
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    steps, last = math.ceil(batches / accumulate), (rows - 1) % rows_per_step + 1
    epochs, most = (trainer.max_epochs, trainer.max_steps) if trainer else (None, -1)
    limits = [*([epochs * steps] if epochs and epochs > 0 else []), *([most] if most > 0 else [])]
    return Pace(rows_per_step, steps, last, min(limits, default=0))


def _row(corpus: Corpus, rows: Rows, number: int, tokenizer: Tokenizer) -> list[Shown]:
    """The segments of a packed sequence, split into runs of one speaker, supervised or not, and control tokens."""
    segments = []
    for sequence, start, stop in rows.row(number):
        ids, marks = corpus.marked(sequence, start, stop)
        marks = marks.copy()
        marks[0] &= 0xFE                                # the first token is not predicted, so not supervised
        special = np.isin(ids, list(tokenizer.special_ids))
        kinds = marks.astype(np.int64) << 1 | special
        cuts = [0, *(np.flatnonzero(np.diff(kinds)) + 1).tolist(), len(ids)]
        runs = [Run(tokenizer.decode(ids[begin:end], skip_special_tokens=False).translate(CONTROLS),
                    SPEAKERS[marks[begin] >> 1], bool(marks[begin] & 1), bool(special[begin]))
                for begin, end in itertools.pairwise(cuts)]
        segments.append(Shown(names.shown(corpus.place(sequence)), start, stop, int(corpus.lengths[sequence]),
                              int((marks & 1).sum()), runs))
    return segments


def _faults(stores: Sequence[TokenStore]) -> Iterator[str]:
    """Problems of records."""
    for report, folder in ((store.report, store.folder) for store in stores):
        if report.stopless:
            yield (f"{report.source}: {report.stopless:,} conversations contain no supervised stop token; a model "
                   "trained on them does not learn to stop")
        if report.double_bos:
            yield f"{report.source}: {report.double_bos:,} sequences begin with two BOS tokens"
        if left := report.notes.get(OPEN_NOTE):
            yield f"{report.source}: in {left:,} records {OPEN_NOTE}; the model learns to write it"
        if report.quarantined:
            yield (f"{report.source}: {report.quarantined:,} bad records were set aside, with their reasons, in "
                   f"{folder / 'quarantine.jsonl'}")


def _doubts(stages: Sequence[Stage], seq_len: int) -> Iterator[str]:
    """Possibly unintended properties."""
    for stage in stages:
        if count := stage.notes.get("duplicates"):
            yield f"{stage.name}: {count:,} records are exact duplicates of earlier ones; data.dedup leaves them out"
        if count := stage.notes.get("also_in_train"):
            yield (f"{stage.name}: {count:,} records are exact duplicates of training records, so its metrics will be "
                   "too good")
        if (count := stage.notes.get("cut", 0)) > stage.sequences // 20:
            lost = stage.notes.get("cut_in_an_answer", 0)
            yield (f"{stage.name}: {count / stage.sequences:.0%} of the sequences are longer than {seq_len:,} tokens "
                   f"and cut, {lost:,} of them in an answer; the longest has {stage.spread[2]:,} tokens (data.seq_len)")
        if stage.padding > 0.2 and stage.name == "train":
            yield f"{stage.name}: {stage.padding:.0%} of the tokens are padding; data.packing: best_fit needs less"
