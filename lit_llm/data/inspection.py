"""The data of a run in, what a person should see of it out: the first rows as the model reads them, and counts of all.

Values first (`examine`), then two ways to show them: on a terminal and as one HTML page that needs nothing else. Knows
nothing of models.
"""

import html
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lit_llm.data.formats import OPEN_NOTE
from lit_llm.data.loader import Corpus
from lit_llm.data.packing import Rows
from lit_llm.data.store import Report
from lit_llm.tokenizer import SPEAKERS, Tokenizer

if TYPE_CHECKING:
    from lit_llm.data.datamodule import TextDataModule

Run = tuple[str, str, bool]                             # text, who says it, whether it is learned
BINS = 12
COLOURS = {"learned": "\x1b[32m", "template": "\x1b[2m", "padding": "\x1b[2m"}      # green, dim
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the data, counted.

    Args:
        name: train, val or test.
        sequences: Conversations and documents.
        rows: Of `seq_len` tokens.
        tokens: In all rows, padding not counted.
        supervised: Of them.
        padding: Share of the rows that is padding.
        notes: What was cut, dropped, or drawn more than once.
        lengths: (edges, counts) of the sequences' tokens; the last bin holds what is longer than a row.
    """

    name: str
    sequences: int
    rows: int
    tokens: int
    supervised: int
    padding: float
    notes: dict[str, int]
    lengths: tuple[list[int], list[int]]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that `inspect` shows.

    Args:
        reports: Of each source, its records.
        stages: Of each stage, its sequences and rows.
        shown: The first training rows, each as its documents, each as runs of text.
        findings: What looks wrong.
        seq_len: Tokens of a row.
    """

    reports: list[Report]
    stages: list[Stage]
    shown: list[list[list[Run]]]
    findings: list[str]
    seq_len: int


def examine(data: "TextDataModule", rows: int = 3) -> Inspection:
    """Look at data that has been set up.

    Args:
        data: Its plans are made.
        rows: How many training rows to show.
    """
    stages = [_stage(name, plan.corpus, plan.rows, plan.notes, data.seq_len) for name, plan in data.plans.items()]
    train = data.plans["train"]
    shown = [_row(train.corpus, train.rows, number, data.tokenizer) for number in range(min(rows, len(train.rows)))]
    return Inspection(data.reports, stages, shown, [*_findings(data.reports, stages)], data.seq_len)


def _stage(name: str, corpus: Corpus, rows: Rows, notes: dict[str, int], seq_len: int) -> Stage:
    tokens = int(rows.lengths.sum())
    edges = [round(edge) for edge in np.linspace(0, seq_len, BINS + 1)]
    counts = np.histogram(corpus.lengths, bins=[*edges, max(seq_len + 1, int(corpus.lengths.max(initial=0)) + 1)])[0]
    return Stage(name, len(corpus), len(rows), tokens, int(rows.supervised.sum()),
                 1 - tokens / max(1, len(rows) * seq_len), notes, (edges, counts.tolist()))


def _row(corpus: Corpus, rows: Rows, number: int, tokenizer: Tokenizer) -> list[list[Run]]:
    """The documents of a row; of each, stretches of one speaker that are learned or not."""
    documents = []
    for sequence, start, stop in rows.row(number):
        ids, marks = corpus.marked(sequence, start, stop)
        marks = marks.copy()
        marks[0] &= 0xFE                                # nothing stands before it to predict it from
        cuts = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
        documents.append([(tokenizer.decode(ids[begin:end], skip_special_tokens=False), SPEAKERS[marks[begin] >> 1],
                           bool(marks[begin] & 1)) for begin, end in itertools.pairwise(cuts)])
    return documents


def _findings(reports: Sequence[Report], stages: Sequence[Stage]) -> Iterator[str]:
    for report in reports:
        if report.stopless:
            yield (f"{report.source}: {report.stopless:,} conversations teach no stop token; a model trained on them "
                   "does not learn to stop")
        if report.double_bos:
            yield f"{report.source}: {report.double_bos:,} sequences begin with two BOS tokens"
        if left := report.notes.get(OPEN_NOTE):
            yield f"{report.source}: in {left:,} records {OPEN_NOTE}; the model learns to say it so"
        if report.quarantined:
            yield f"{report.source}: {report.quarantined:,} bad records were set aside"
    for stage in stages:
        if stage.notes.get("duplicates"):
            yield f"{stage.name}: {stage.notes['duplicates']:,} records say exactly what an earlier one says"
        if stage.padding > 0.2 and stage.name == "train":
            yield f"{stage.name}: {stage.padding:.0%} of the rows is padding; data.packing: best_fit wastes less"


# ---- on a terminal ---------------------------------------------------------------------------------------------------

def as_text(seen: Inspection, *, colour: bool) -> str:
    """Lines for a terminal; control characters of the data do not reach it."""
    lines = []
    for number, documents in enumerate(seen.shown, 1):
        lines.append(f"row {number} of {seen.stages[0].rows:,} ({'green' if colour else '[...]'} is learned)")
        lines += ["  " + "".join(_painted(run, colour) for run in runs).replace("\n", "\n  ") + "\n  ----"
                  for runs in documents]
    for report in seen.reports:
        lines += describe(report)
        lines += [f"  {name:<10} {tokens:>12,} tokens, {learned:>12,} learned" for name, (tokens, learned)
                  in report.speakers.items()]
    for stage in seen.stages:
        notes = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in stage.notes.items() if count)
        lines.append(f"{stage.name}: {stage.sequences:,} sequences{notes}; {stage.tokens:,} tokens, "
                     f"{stage.supervised / max(1, stage.tokens):.1%} learned; {stage.rows:,} rows of {seen.seq_len}, "
                     f"{1 - stage.padding:.1%} full")
        lines += _histogram(*stage.lengths)
    return "\n".join([*lines, *(f"look: {finding}" for finding in seen.findings)])


def describe(report: Report) -> list[str]:
    """A source's records in words; one line, and one for each reason to drop."""
    lines = [f"{report.source}: {report.read:,} records, {report.kept:,} kept, {report.tokens:,} tokens"]
    if report.cleaned:
        lines.append(f"  {report.cleaned:,} cleaned")
    lines += [f"  {name} in {count:,} file{'s' * (count > 1)}" for name, count in report.mended.items()]
    lines += [f"  {count:,} records: {name}" for name, count in report.notes.items()]
    return lines + [f"  {count:,} dropped: {reason} (first at {first})"
                    for reason, (count, first) in report.dropped.items()]


def _painted(run: Run, colour: bool) -> str:
    text, speaker, learned = run
    text = text.translate(CONTROLS)
    if not colour:
        return f"[{text}]" if learned else text
    paint = COLOURS["learned"] if learned else COLOURS.get(speaker, "")
    return f"{paint}{text}\x1b[0m" if paint else text


def _histogram(edges: Sequence[int], counts: Sequence[int]) -> list[str]:
    most = max([1, *counts])
    names = [f"{low:,}-{high:,}" for low, high in itertools.pairwise(edges)] + [f"over {edges[-1]:,}"]
    return [f"  {name:>15} {count:>9,} {'#' * round(40 * count / most)}"
            for name, count in zip(names, counts, strict=True) if count]


# ---- as a page -------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: .5rem 0 1.5rem }} td, th {{ padding: .15rem .8rem; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} th {{ border-bottom: 1px solid #999; font-weight: 600 }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f4; padding: .8rem; border-radius: 6px }}
.learned {{ background: #c9efc9 }} .template {{ color: #999 }} .bar {{ background: #6a9fd8; height: .8rem }}
.look {{ background: #fff3cd; padding: .4rem .8rem; border-radius: 6px; margin: .3rem 0 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #1b1b1b; color: #ddd }} pre {{ background: #262626 }}
.learned {{ background: #1f5a2a }} .template {{ color: #777 }} .look {{ background: #5a4a12 }} }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def as_page(seen: Inspection, title: str) -> str:
    """The same as one HTML page, without scripts; what the data says is escaped."""
    body = [f'<div class="look">{html.escape(finding)}</div>' for finding in seen.findings]
    for report in seen.reports:
        body.append(f"<h2>{html.escape(report.source)}</h2>")
        body += [f"<div>{html.escape(line)}</div>" for line in describe(report)]
        body.append(_table(["who says it", "tokens", "learned"], [
            [name, f"{tokens:,}", f"{learned:,}"] for name, (tokens, learned) in report.speakers.items()]))
    for stage in seen.stages:
        facts = {"sequences": stage.sequences, "tokens": stage.tokens, "learned": stage.supervised, "rows": stage.rows,
                 **{name.replace("_", " "): count for name, count in stage.notes.items()}}
        body += [f"<h2>{stage.name}</h2>", _table(["", ""], [
            *([name, f"{value:,}"] for name, value in facts.items()), ["full", f"{1 - stage.padding:.1%}"]])]
        body.append(_bars(*stage.lengths))
    body.append('<h2>First rows</h2><p><span class="learned">learned</span>, '
                '<span class="template">of the template</span></p>')
    body += ["<pre>" + "<hr>".join("".join(map(_span, runs)) for runs in row) + "</pre>" for row in seen.shown]
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def _span(run: Run) -> str:
    text, speaker, learned = run
    kind, said = "learned" if learned else speaker, html.escape(text.translate(CONTROLS))
    return f'<span class="{kind}" title="{speaker}">{said}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + f"</tr>{cells}</table>"


def _bars(edges: Sequence[int], counts: Sequence[int]) -> str:
    most = max([1, *counts])
    names = [f"{low:,}–{high:,}" for low, high in itertools.pairwise(edges)] + [f"over {edges[-1]:,}"]
    rows = "".join(f'<tr><td>{name}</td><td>{count:,}</td><td style="width:20rem"><div class="bar" '
                   f'style="width:{100 * count / most:.1f}%"></div></td></tr>'
                   for name, count in zip(names, counts, strict=True))
    return f"<table><tr><th>tokens</th><th>sequences</th><th></th></tr>{rows}</table>"
