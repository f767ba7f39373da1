"""Compare runs on one page: their metrics, curves over the same axes, and the settings that differ."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lit_llm.report import page
from lit_llm.report.drawing import curves, elements
from lit_llm.report.measured import with_interval
from lit_llm.report.texts import text

METRICS = (*(f"val/{name}" for name in ("perplexity", "nll", "bits_per_byte", "bits_per_character", "token_accuracy",
                                        "tokens")), "guard/nll", "guard/rise")
COST = ("tokens", "training_seconds", "tokens_per_second")


def compared(every: Sequence[dict[str, Any]]) -> str:
    """The comparison of runs as an HTML page.

    Args:
        every: For each run the values of its `report.json`.
    """
    names = names_of(every)
    drawn = _charts(every, names)
    body = [f"<header><h1>{text('comparison')}</h1><button id=switch type=button>{text('switch')}</button></header>",
            *_metrics(every, names)]
    if drawn:
        body.append(f"<h2>{text('curves')}</h2><p class=soft>{text('hint')}</p>{page.grid(drawn, range(len(drawn)))}")
    body += _settings(every, names)
    return page.whole(", ".join(names), body, drawn)


def names_of(every: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the runs, or their folders where names are equal."""
    names = [facts["run"]["name"] for facts in every]
    return [name if names.count(name) == 1 else facts["run"]["folder"]
            for name, facts in zip(names, every, strict=True)]


def _charts(every: Sequence[dict[str, Any]], names: Sequence[str]) -> list[curves.Chart]:
    """A chart for each metric that at least one run has, with a curve for each run."""
    grouped: dict[str, list[curves.Series]] = {}
    for name, facts in zip(names, every, strict=True):
        for metric, series in curves.series_of(facts).items():
            grouped.setdefault(metric, []).append(replace(series, name=name))
    keys = {metric: key for key, metrics in curves.CHARTS for metric in metrics[:1]}
    return [curves.Chart(keys.get(metric, ""), metric, series) for metric, series in
            sorted(grouped.items(), key=lambda item: list(keys).index(item[0]) if item[0] in keys else len(keys))]


def _metrics(every: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    yield f"<h2>{text('metrics')}</h2>"
    rows = [[text("state"), *(text(facts["run"]["state"]) for facts in every)],
            [text("last_step"), *(elements.shown(facts["run"]["step"]) for facts in every)],
            [f"{text('best')}: {text('step')}", *(elements.shown(curves.best_step(facts)) for facts in every)]]
    rows += [[name, *(with_interval(facts["metrics"]["best"], name) for facts in every)] for name in METRICS
             if any(name in facts["metrics"]["best"] for facts in every)]
    rows += [[text("tokens_computed" if name == "tokens" else name), *(
        (elements.duration if name == "training_seconds" else elements.amount)(facts["cost"][name]) for facts in every)]
        for name in COST if any(facts["cost"][name] is not None for facts in every)]
    yield elements.table(["", *map(elements.safe, names)], rows)


def _settings(every: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    """The settings in which the runs differ; a value that is the default is shown as such."""
    settings_of_runs = [{entry["key"]: entry["value"] for entry in facts["config"]} for facts in every]
    defaults = {entry["key"]: entry["default"] for facts in every for entry in facts["config"]}
    rows = []
    for key, default in defaults.items():
        values = [settings.get(key, default) for settings in settings_of_runs]
        if any(value != values[0] for value in values):
            rows.append([elements.safe(key), *map(elements.value, values)])
    if rows:
        yield f"<h2>{text('differences')}</h2>"
        yield elements.table([text("key"), *map(elements.safe, names)], rows)


