"""Format the facts of a run as one HTML page without external resources; all data are escaped, in both languages.

The content security policy allows this page's own style and script by their hashes, and nothing else.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lit_llm.report import measured
from lit_llm.report.drawing import curves
from lit_llm.report.drawing.elements import amount, duration, percent, place, safe, shown, table, value
from lit_llm.report.texts import TEXTS, text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{style_hash}'; \
script-src 'sha256-{script_hash}'; base-uri 'none'; form-action 'none'">
<style>{style}</style></head>
<body>
{body}
<script type="application/json" id="points">{points}</script>
<script>{script}</script>
</body></html>
"""


def page(facts: dict[str, Any]) -> str:
    """The report of one run.

    Args:
        facts: The values of `report.json`.
    """
    run, best = facts["run"], curves.best_step(facts)
    drawn = curves.charts(facts)
    main = [at for at, chart in enumerate(drawn) if chart.key]
    others = [at for at, chart in enumerate(drawn) if not chart.key]
    body = [*_head(run["name"], run["state"]), *_notices(facts), *_tiles(facts)]
    if drawn:
        body.append(f"<h2>{text('curves')}</h2><p class=soft>{text('hint')}</p>")
        body.append(grid(drawn, main or others, best))
    if main and others:
        body.append(f"<details><summary>{text('more_curves')}</summary>{grid(drawn, others, best)}</details>")
    body += [*measured.metrics(facts), *measured.breakdown(facts["breakdown"]),
             *measured.forgetting(facts["forgetting"]), *_samples(facts["samples"]), *_answers(facts["answers"]),
             *_data(facts["data"]),
             *_evaluations(facts["evaluations"]), *_config(facts["config"]), *_cost(facts),
             *_commands(facts["commands"])]
    return whole(run["name"], body, drawn)


def whole(title: str, body: Iterable[str], drawn: Sequence[curves.Chart]) -> str:
    """A complete page.

    Args:
        title: Its title, unescaped.
        body: Its content as HTML.
        drawn: Its charts, in the order of their numbers.
    """
    style, script = resource("page.css"), resource("page.js")
    points = json.dumps(curves.values_of(drawn)).replace("<", "\\u003c")
    return PAGE.format(title=safe(title), style=style, style_hash=_hash(style), script=script,
                       script_hash=_hash(script), body="\n".join(body), points=points)


@cache
def resource(name: str) -> str:
    """A file of this package."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    return base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


# ---- parts of the page -----------------------------------------------------------------------------------------------

def _head(name: str, state: str) -> Iterator[str]:
    yield (f"<header><h1>{safe(name)}</h1><span class='state {safe(state)}'>{text(state)}</span>"
           f"<button id=switch type=button>{text('switch')}</button></header>")


def _notices(facts: dict[str, Any]) -> Iterator[str]:
    run = facts["run"]
    yield f"<p>{text('say_' + run['state'])}</p>"
    if run["reason"]:
        yield f"<p class=look>{text('reason')}: {safe(run['reason'])}</p>"
    resume = next((entry["command"] for entry in facts["commands"] if entry["what"] == "resume"), None)
    if resume:
        yield f"<div class=command>{text('to_resume')}<pre>{safe(resume)}</pre></div>"
    yield from (f"<div class=look lang=en>{safe(words)}</div>" for words in facts["warnings"])


def _tiles(facts: dict[str, Any]) -> Iterator[str]:
    run, metrics, cost = facts["run"], facts["metrics"], facts["cost"]
    perplexity = [figures.get("val/perplexity") for figures in (metrics["before"], metrics["best"])]
    shown_values = [f"{value:,.0f}" if value >= 1000 else f"{value:.4g}" for value in perplexity if value is not None]
    planned = f" / {run['planned_steps']:,}" if isinstance(run["planned_steps"], int) else ""
    tiles = [("val/perplexity", " → ".join(shown_values)),
             (text("last_step"), f"{run['step']:,}{planned}" if run["step"] is not None else ""),
             (text("saved_step"), f"{run['saved_step']:,}" if run["saved_step"] is not None else text("none")),
             (text("tokens_computed"), amount(cost["tokens"])), (text("seconds"), duration(cost["seconds"])),
             (text("tokens_per_second"), amount(cost["tokens_per_second"]))]
    yield "<div class=tiles>" + "".join(f"<div class=tile><span class=soft>{name}</span><b>{value}</b></div>"
                                        for name, value in tiles if value) + "</div>"


def grid(drawn: Sequence[curves.Chart], places: Iterable[int], best: int | None = None) -> str:
    """Charts beside each other.

    Args:
        drawn: All charts of the page.
        places: Numbers of those that are shown here.
        best: Step of the best checkpoint.
    """
    figures = []
    for at in places:
        chart = drawn[at]
        title = text(chart.key) if chart.key else safe(chart.name)
        legend = "".join(f'<span class="s{number % len(curves.COLOURS)}">{safe(series.name)}</span>'
                         for number, series in enumerate(chart.series))
        label = TEXTS[chart.key][0] if chart.key else chart.name
        figures.append(f'<figure data-chart="{at}"><figcaption>{title}</figcaption>'
                       f'{curves.svg(chart, best, label)}<div class=legend>{legend}</div>'
                       '<output aria-live="polite"></output></figure>')
    return f'<div class=charts>{"".join(figures)}</div>'


def _samples(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The answers to each prompt at the validations, step by step."""
    if samples:
        yield f"<h2>{text('samples')}</h2>"
    for sample in samples:
        sides = "".join(f"<div><span class=soft>{text(side)}</span><pre>{safe(sample[side])}</pre></div>"
                        for side in ("prompt", "expected") if sample.get(side) is not None)
        rows = [[shown(answer.get("step")), f"<pre>{safe(answer.get('answer'))}</pre>",
                 safe(answer.get("finish_reason"))] for answer in sample["answers"]]
        yield (f"<div class=sample><div class=sides>{sides}</div>"
               f"{table([text('step'), text('answer'), text('finish')], rows)}</div>")


def _answers(answers: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The answers of the base and of the exported model at the end."""
    if answers:
        yield f"<h2>{text('answers')}</h2>"
    for answer in answers:
        sides = "".join(f"<div><span class=soft>{text(side)}</span><pre>{safe(answer[side])}</pre></div>"
                        for side in ("prompt", "expected", "base", "tuned") if answer.get(side) is not None)
        yield (f"<div class=sample><p>{text('step')} {shown(answer.get('step'))}, {text(str(answer.get('kind')))}</p>"
               f"<div class=sides>{sides}</div></div>")


def _data(data: dict[str, Any]) -> Iterator[str]:
    if not data["sources"] and not data["stages"]:
        return
    yield f"<h2>{text('data')}</h2>"
    rows = [[place(source["source"]) if not number else "", safe(speaker), shown(counts["tokens"]),
             shown(counts["supervised"]), percent(counts["supervised"], counts["tokens"])]
            for source in data["sources"] for number, (speaker, counts) in enumerate(source["speakers"].items())]
    if rows:
        yield f"<h3>{text('mask')}</h3>"
        yield table([text("source"), text("speaker"), text("tokens"), text("supervised"), text("share")], rows)
    if data["drawn"]:
        yield f"<h3>{text('ledger')}</h3>"
        yield table([text("source"), text("sequences"), text("tokens"), text("supervised"), text("share")],
                    [[place(entry["source"]), shown(entry.get("sequences")), shown(entry.get("tokens")),
                      shown(entry.get("supervised")), percent(entry["share"], 1)] for entry in data["drawn"]])
    yield f"<h3>{text('skipped')}</h3>"
    yield table([text("source"), text("read"), text("kept"), text("reason"), text("count"), text("first")],
                _skipped(data["sources"]))
    yield f"<h3>{text('stages')}</h3>"
    yield table(["", text("name"), text("count")], [
        [text(stage), text(name), shown(count)] for stage, counts in data["stages"].items()
        for name, count in counts.items() if count])


def _skipped(sources: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for source in sources:
        head = [place(source["source"]), shown(source["read"]), shown(source["kept"])]
        rows = [[f"{text('dropped')}: {safe(entry['reason'])}", shown(entry["count"]), place(entry["first"])]
                for entry in source["dropped"]]
        noted = {name: source.get(name) for name in ("stopless", "cleaned", "double_bos")}
        rows += [[text(name) if name in TEXTS else safe(name), shown(count), ""]
                 for name, count in (noted | source["notes"] | source["mended"]).items() if count]
        for number, row in enumerate(rows or [["", "", ""]]):
            yield [*(head if not number else ["", "", ""]), *row]


def _evaluations(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not lines:
        return
    yield f"<h2>{text('evaluations')}</h2>"
    rows = []
    for line in lines:
        split = "val" if line.get("verb") == "validate" else "test"
        rows.append([safe(line.get("time")), safe(line.get("verb")), safe(line.get("checkpoint") or line.get("base")),
                     shown(line.get(f"{split}/perplexity")), shown(line.get(f"{split}/tokens")),
                     safe(line.get("other_data") or "")])
    yield table([*map(text, ("time", "verb", "checkpoint")), "perplexity", *map(text, ("tokens", "other_data"))], rows)


def _config(config: Sequence[dict[str, Any]]) -> Iterator[str]:
    if config:
        yield f"<h2>{text('config')}</h2>"
        yield table([text("key"), text("value"), text("default")],
                    [[safe(entry["key"]), value(entry["value"]), value(entry["default"])] for entry in config])


def _cost(facts: dict[str, Any]) -> Iterator[str]:
    cost = facts["cost"]
    unknown = f"<span class=soft>{text('not_known')}</span>"
    forms = {name: duration for name in cost if name.endswith("seconds")} | {
        "utilisation": lambda share: percent(share, 1)}
    rows = [[text("tokens_computed" if name == "tokens" else name),
             forms.get(name, amount)(number) if number is not None else unknown] for name, number in cost.items()]
    yield f"<h2>{text('cost')}</h2>{table(['', ''], rows)}<p class=soft>{text('unmeasured')}</p>"
    about = facts["hardware"] | facts["versions"]
    counts = facts["run"]["parameters"] or {}
    rows = [[text({"trained": "trainable"}.get(name, name)), shown(count)] for name, count in counts.items()]
    if rows or about:
        yield f"<h3>{text('versions')}</h3>"
        yield table(["", ""], [*rows, *([safe(name), shown(item)] for name, item in about.items())])


def _commands(commands: Sequence[dict[str, str]]) -> Iterator[str]:
    yield f"<h2>{text('commands')}</h2>"
    for entry in commands:
        what = "again" if entry["what"] == "report" else entry["what"]
        yield f"<div class=command>{text(what)}<pre>{safe(entry['command'])}</pre></div>"
