"""Format an inspection as an HTML page without external resources or scripts; all data are escaped."""

import html
from collections.abc import Iterator, Sequence

from lit_llm.data.inspect.inspection import NOTES, Inspection, Run, Shown, Stage
from lit_llm.data.inspect.terminal import bins
from lit_llm.data.tokens.store import Report

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root {{ --ink: #222; --paper: #fff; --soft: #777; --line: #ddd; --box: #f7f7f5; --supervised: #c9efc9; --look: #fff3cd;
  --bar: #6a9fd8; --special: #b04a00 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #ddd; --paper: #1b1b1b; --soft: #999; --line: #444;
  --box: #262626; --supervised: #1f5a2a; --look: #5a4a12; --bar: #4a78a8; --special: #ffb070 }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper) }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin: 2rem 0 .4rem; overflow-wrap: anywhere }}
h3 {{ font-size: 1rem; margin: 1.2rem 0 .3rem }}
p {{ margin: .3rem 0 }} .soft {{ color: var(--soft) }}
table {{ border-collapse: collapse; margin: .4rem 0 1rem }}
td, th {{ padding: .12rem .9rem .12rem 0; text-align: right; font-variant-numeric: tabular-nums }}
td:first-child, th:first-child {{ text-align: left; overflow-wrap: anywhere }}
th {{ border-bottom: 1px solid var(--line); font-weight: 600 }}
.bars td:first-child {{ text-align: right; white-space: nowrap }} .bars td:last-child {{ width: 24rem; padding: 0 }}
.bar {{ background: var(--bar); height: .8rem }}
.look {{ background: var(--look); padding: .4rem .8rem; border-radius: 6px; margin: .3rem 0; overflow-wrap: anywhere }}
.row {{ border: 1px solid var(--line); border-radius: 6px; max-height: 24rem; overflow: auto; background: var(--box) }}
.row p {{ padding: .2rem .8rem; font-size: .85rem; border-bottom: 1px solid var(--line); color: var(--soft) }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: .5rem .8rem; font-size: .85rem }}
.supervised {{ background: var(--supervised) }} .template {{ color: var(--soft) }}
.special {{ color: var(--special); font-weight: 600 }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def as_page(seen: Inspection, title: str) -> str:
    """Format the inspection.

    Args:
        seen: The inspection.
        title: Title of the page.
    """
    body = [f'<div class="look">{html.escape(finding)}</div>' for finding in seen.findings]
    if (pace := seen.pace) is not None:
        last = f" (the last one {pace.last:,})" if pace.last < pace.rows else ""
        run = f"; {pace.run:,} in the run" if pace.run else ""
        body.append(f"<p>{pace.epoch:,} steps per epoch, of {pace.rows:,} packed sequences each{last}{run}.</p>")
    if seen.shown:
        body.append('<h2>First packed sequences</h2><p><span class="supervised">supervised</span>, '
                    '<span class="template">of the template</span>, <span class="special">control tokens</span>; '
                    'hover to see the speaker</p>')
    for number, segments in enumerate(seen.shown, 1):
        used = sum(segment.stop - segment.start for segment in segments)
        padding = f", then {seen.seq_len - used:,} of padding" if used < seen.seq_len else ""
        body.append(f"<h3>Sequence {number} of {seen.stages[0].rows:,}: {used:,} tokens{padding}</h3>"
                    f'<div class="row">{"".join(map(_segment, segments))}</div>')
    for stage in seen.stages:
        body += _stage(stage, seen.seq_len)
    for report in seen.reports:
        body += _source(report)
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def _stage(stage: Stage, seq_len: int) -> Iterator[str]:
    yield f"<h2>{stage.name}</h2>"
    facts = [["sequences", f"{stage.sequences:,}", ""], [f"packed sequences of {seq_len:,}", f"{stage.rows:,}", ""],
             ["tokens", f"{stage.tokens:,}", ""],
             ["supervised", f"{stage.supervised:,}", f"{stage.supervised / stage.tokens:.1%}"],
             ["padding", f"{stage.rows * seq_len - stage.tokens:,}", f"{stage.padding:.1%}"]]
    facts += [[NOTES.get(name, name), f"{count:,}", f"{count / stage.sequences:.1%}"]
              for name, count in stage.notes.items() if count]
    yield _table(["", "", ""], facts)
    yield f"<h3>{'Drawn per epoch' if stage.name == 'train' else 'Sources'}</h3>"
    yield _table(["source", "sequences", "tokens", "supervised", "share"], [
        [source, *(f"{counts[key]:,}" for key in ("sequences", "tokens", "supervised")),
         f"{counts['tokens'] / stage.tokens:.1%}"] for source, counts in stage.drawn.items()])
    least, half, most = stage.spread
    yield f"<h3>Tokens per sequence: {least:,} to {most:,}, median {half:,}</h3>"
    edges, counts = stage.lengths
    highest = max([1, *counts])
    rows = "".join(f'<tr><td>{name}</td><td>{count:,}</td><td><div class="bar" '
                   f'style="width:{100 * count / highest:.1f}%"></div></td></tr>'
                   for name, count in zip(bins(edges), counts, strict=True))
    yield f'<table class="bars"><tr><th>tokens</th><th>sequences</th><th></th></tr>{rows}</table>'


def _source(report: Report) -> Iterator[str]:
    yield f"<h2>{html.escape(report.source)}</h2>"
    yield _table(["records", "", ""], [
        ["read", f"{report.read:,}", ""], ["kept", f"{report.kept:,}", ""],
        *([f"dropped: {reason}", f"{count:,}", f"first at {first}"] for reason, (count, first) in
          sorted(report.dropped.items(), key=lambda item: -item[1][0])),
        *([name, f"{count:,}", ""] for name, count in report.noted.items())])
    yield _table(["speaker", "tokens", "supervised", ""], [
        [name, f"{tokens:,}", f"{supervised:,}", f"{supervised / tokens:.1%}"]
        for name, (tokens, supervised) in report.speakers.items()])


def _segment(segment: Shown) -> str:
    part = f"tokens {segment.start:,} to {segment.stop:,} of {segment.length:,}"
    return (f"<p>{html.escape(segment.place)}: {part}, {segment.supervised:,} supervised</p>"
            f"<pre>{''.join(map(_span, segment.runs))}</pre>")


def _span(run: Run) -> str:
    kinds = " ".join([*(["supervised"] if run.supervised else []), *(["special"] if run.special else []), run.speaker])
    return f'<span class="{kinds}" title="{run.speaker}">{html.escape(run.text)}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>" if any(head) else ""
    return f"<table>{top}{cells}</table>"
