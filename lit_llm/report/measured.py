"""Format what was measured of a run as HTML: metrics with their intervals, breakdowns, and forgetting."""

from collections.abc import Iterator
from typing import Any

from lit_llm.report.drawing.curves import ENDS
from lit_llm.report.drawing.elements import percent, safe, shown, table
from lit_llm.report.texts import text

SHOWN = ("perplexity", "nll", "bits_per_byte", "bits_per_character", "token_accuracy", "tokens")    # in this order
PARTS = ("sources", "answers", "positions")         # of a breakdown
HEADS = {"sources": "source", "answers": "nth_answer"}


def metrics(facts: dict[str, Any]) -> Iterator[str]:
    """The metrics before training, of the best and of the last checkpoint, and the list of checkpoints."""
    columns = facts["metrics"]
    names = [name for name in dict.fromkeys(name for figures in columns.values() for name in figures)
             if not name.endswith(ENDS)]
    names.sort(key=lambda name: (name.partition("/")[0], SHOWN.index(name.partition("/")[2])
                                 if name.partition("/")[2] in SHOWN else len(SHOWN)))
    if names:
        yield f"<h2>{text('metrics')}</h2>"
        yield table([text("metric"), text("before"), text("best"), text("last")],
                    [[safe(name), *(with_interval(columns[part], name) for part in ("before", "best", "last"))]
                     for name in names])
        if any(name.endswith(ENDS) for figures in columns.values() for name in figures):
            yield f"<p class=soft>{text('interval')}</p>"
    if facts["checkpoints"]:
        yield f"<h3>{text('checkpoints')}</h3>"
        yield table([text("name"), text("step"), text("score"), ""],
                    [[safe(entry["name"]), shown(entry["step"]), shown(entry["score"]), "★" * bool(entry["best"])]
                     for entry in facts["checkpoints"]])


def with_interval(figures: dict[str, Any], name: str) -> str:
    """A figure, with its interval where it is among the figures as `NAME_low` and `NAME_high`."""
    low, high = (figures.get(name + end) for end in ENDS)
    if low is None or high is None:
        return shown(figures.get(name))
    return f"{shown(figures.get(name))} <span class=soft>{_short(low)} … {_short(high)}</span>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else safe(value)


def breakdown(parts: dict[str, Any]) -> Iterator[str]:
    """The nll of the newest validation by source, answer and position.

    Args:
        parts: The last line of `breakdown.jsonl`; empty without one.
    """
    shares = [(part, parts[part]) for part in PARTS if isinstance(parts.get(part), dict)]
    if not shares:
        return
    yield f"<h2>{text('breakdown')}</h2><p class=soft>{text('step')} {shown(parts.get('step'))}. {text('interval')}</p>"
    for part, groups in shares:
        rows = [[safe(name), with_interval(figures, "nll"), shown(figures.get("perplexity")),
                 percent(figures.get("token_accuracy"), 1), _count(figures.get("tokens")),
                 _count(figures.get("documents"))]
                for name, figures in groups.items() if isinstance(figures, dict)]
        yield table([text(HEADS.get(part, part)), "nll", "perplexity",
                     *map(text, ("accuracy", "tokens", "documents"))], rows)


def forgetting(facts: dict[str, Any] | None) -> Iterator[str]:
    """How much the loss of the guard documents has risen.

    Args:
        facts: As in `facts.forgetting_of`; null for a run without guard documents.
    """
    if facts is None:
        return
    yield f"<h2>{text('forgetting')}</h2><p class=soft>{text('say_forgetting')}</p>"
    newest = facts["rows"][-1]
    if newest["low"] is not None and newest["low"] > 0:
        yield f"<p class=look>{text('forgot')}</p>"
    rows = [[shown(row["step"]), shown(row["nll"]), _signed(row["rise"]),
             f"{_signed(row['low'])} … {_signed(row['high'])}" if row["low"] is not None else text("none"),
             percent(row["worse"], 1)] for row in facts["rows"]]
    yield table([text("step"), "guard/nll", text("rise_short"), text("interval_95"), text("worse")], rows)
    counts = [(text("documents"), facts["documents"]), (text("supervised"), facts["tokens"])]
    yield "<p class=soft>" + ", ".join(f"{name}: {_count(count)}" for name, count in counts if count) + "</p>"


def _signed(value: Any) -> str:
    return f"{value:+.4f}" if isinstance(value, int | float) else ""


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else ""
