"""Format an inspection for a terminal of at least 80 columns; control characters of the data were removed before."""

import itertools
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from lit_llm.data.inspect.inspection import NOTES, Inspection, Run, Shown, Stage
from lit_llm.data.rows.corpus import Tally
from lit_llm.data.tokens.store import Report

SUPERVISED, QUIET, BOLD, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"       # green, dim
REASONS = 8                                             # reasons for dropping records that are shown per source


def as_text(seen: Inspection, *, colour: bool, characters: int = 400) -> str:
    """Format the inspection.

    Args:
        seen: The inspection.
        colour: Whether the terminal has colours; without them, supervised text is in brackets.
        characters: Maximum number of characters per run of one speaker; 0 shows all.
    """
    say = "supervised in green, control tokens in bold" if colour else "⟦...⟧ is supervised"
    lines: list[str] = []
    for number, segments in enumerate(seen.shown, 1):
        used = sum(segment.stop - segment.start for segment in segments)
        of = f"sequence {number} of {seen.stages[0].rows:,}"
        lines.append(_strong(f"{of}: {used:,} of {seen.seq_len:,} tokens ({say})", colour))
        for segment in segments:
            lines += [_ruled(_origin(segment), colour), *_marked(segment.runs, colour, characters).split("\n")]
        padding = f"{_several(seen.seq_len - used, 'token')} of padding" if used < seen.seq_len else ""
        lines += [_ruled(padding, colour), ""]
    for report in seen.reports:
        lines += [_strong(report.source, colour), *("  " + line for line in _records(report)), *_speakers(report), ""]
    for stage in seen.stages:
        lines += [_strong(stage.name, colour), *_stage(stage, seen.seq_len), *_drawn(stage), *_histogram(stage), ""]
    looks = [line for finding in seen.findings for line in
             textwrap.wrap(f"look: {finding}", _width(), subsequent_indent="      ", break_on_hyphens=False)]
    return "\n".join([*lines, *_pace(seen), *looks])


def short(seen: Inspection) -> str:
    """The summary that `fit` prints before the first step."""
    lines = [seen.note] if seen.note else []
    for report in seen.reports:
        first, *rest = _records(report)
        lines += [f"{report.source}: {first}", *("  " + line for line in rest)]
    for stage in seen.stages:
        first, *rest = _stage(stage, seen.seq_len)
        lines += [f"{stage.name}: {first.strip()}", *rest]
        if stage.name == "train" and len(stage.drawn) > 1:
            lines += _drawn(stage)
    return "\n".join([*lines, *_pace(seen)])


def ledger(drawn: Tally, name: str) -> list[str]:
    """A table of what was drawn of each source."""
    whole = max(1, sum(counts["tokens"] for counts in drawn.values()))
    rows = [[source, f"{counts['sequences']:,}", f"{counts['tokens']:,}", f"{counts['supervised']:,}",
             f"{counts['tokens'] / whole:.1%}"] for source, counts in drawn.items()]
    return _table([name, "sequences", "tokens", "supervised", "share"], rows)


# ---- rows ------------------------------------------------------------------------------------------------------------

def _origin(segment: Shown) -> str:
    tokens = f"{segment.stop - segment.start:,} tokens, {segment.supervised:,} supervised"
    if segment.stop - segment.start < segment.length:
        tokens = (f"tokens {segment.start:,} to {segment.stop:,} of {segment.length:,}, "
                  f"{segment.supervised:,} supervised")
    return f"{_fitted(segment.place, 70 - len(tokens))}: {tokens}"


def _ruled(text: str, colour: bool) -> str:
    line = f"---- {text} ".ljust(78, "-") if text else "-" * 78
    return f"{QUIET}{line}{PLAIN}" if colour else line


def _marked(runs: Sequence[Run], colour: bool, characters: int) -> str:
    """Text of a segment, with supervised tokens in green or in brackets."""
    out = []
    for supervised, group in itertools.groupby(runs, key=lambda run: run.supervised):
        words = [(run, _shortened(run.text, characters)) for run in group]
        if not colour:
            text = "".join(text for _, text in words)
            out.append(f"⟦{text}⟧" if supervised else text)
            continue
        for run, text in words:
            paint = SUPERVISED if supervised else QUIET if run.speaker == "template" else ""
            paint += BOLD if run.special else ""
            out.append(f"{paint}{text}{PLAIN}" if paint else text)
    return "".join(out)


def _shortened(text: str, most: int) -> str:
    if not most or len(text) <= most:
        return text
    head, tail = text[:most * 2 // 3], text[len(text) - most // 3:]
    return f"{head} ... {len(text) - len(head) - len(tail):,} more characters ... {tail}"


# ---- counts ----------------------------------------------------------------------------------------------------------

def _records(report: Report) -> Iterator[str]:
    """A source's records: one line, and one for each reason to drop records."""
    share = f", {report.supervised / report.tokens:.1%} supervised" if report.tokens else ""
    yield f"{_several(report.read, 'record')}, {report.kept:,} kept; {report.tokens:,} tokens{share}"
    yield from (f"{count:,} {name}" for name, count in report.noted.items())
    reasons = sorted(report.dropped.items(), key=lambda item: -item[1][0])
    for reason, (count, first) in reasons[:REASONS]:
        yield f"{count:,} dropped: {reason} (first at {first})"
        if fix := report.fixes.get(reason):
            yield f"  {fix}"
    if more := reasons[REASONS:]:
        yield f"{sum(count for _, (count, _) in more):,} dropped for {len(more):,} other reasons"


def _speakers(report: Report) -> list[str]:
    rows = [[name, f"{tokens:,}", f"{supervised:,}", f"{supervised / tokens:.1%}"]
            for name, (tokens, supervised) in report.speakers.items()]
    return _table(["speaker", "tokens", "supervised", ""], rows)


def _stage(stage: Stage, seq_len: int) -> Iterator[str]:
    yield (f"  {_several(stage.sequences, 'sequence')} in {_several(stage.rows, 'packed sequence')} of {seq_len:,}, "
           f"{1 - stage.padding:.1%} full")
    yield f"  {stage.tokens:,} tokens, {stage.supervised / stage.tokens:.1%} supervised"
    for name, count in stage.notes.items():
        if count:
            yield f"  {count:,} ({count / stage.sequences:.1%}) {NOTES.get(name, name)}"


def _drawn(stage: Stage) -> list[str]:
    return ledger(stage.drawn, "per epoch") if stage.name == "train" else []


def _histogram(stage: Stage) -> Iterator[str]:
    edges, counts = stage.lengths
    least, half, most = stage.spread
    yield f"  tokens per sequence: {least:,} to {most:,}, median {half:,}"
    highest = max([1, *counts])
    for name, count in zip(bins(edges), counts, strict=True):
        if count:
            yield f"  {name:>15} {count:>11,} {'█' * round(36 * count / highest)}".rstrip()


def bins(edges: Sequence[int]) -> list[str]:
    """Names of a histogram's bins; the last one is for sequences longer than `seq_len`."""
    return [f"{low:,} - {high - 1:,}" if high - low > 1 else f"{low:,}" for low, high in itertools.pairwise(edges)] + [
        f"over {edges[-1] - 1:,}"]


def _pace(seen: Inspection) -> list[str]:
    if (pace := seen.pace) is None:
        return []
    last = f" (the last one {pace.last:,})" if pace.last < pace.rows else ""
    run = f"; {pace.run:,} in the run" if pace.run else ""
    return [f"steps: {pace.epoch:,} per epoch, of {_several(pace.rows, 'packed sequence')} each{last}{run}"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Format columns; the first has names and takes the remaining width."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *rows]) for column in range(len(head))]
    widths[0] = max(12, min(widths[0], _width() - 2 - sum(width + 2 for width in widths[1:])))
    return ["  " + _fitted(row[0], widths[0]).ljust(widths[0]) + "".join(
        "  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)).rstrip()
        for row in [list(head), *rows]]


def _several(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def _width() -> int:
    return max(80, min(shutil.get_terminal_size((80, 24)).columns, 120)) - 2


def _fitted(name: str, room: int) -> str:
    """Shorten a path at its beginning."""
    return name if len(name) <= room else "..." + name[3 - max(room, 12):]


def _strong(text: str, colour: bool) -> str:
    return f"{BOLD}{text}{PLAIN}" if colour else text
