"""The results of `evaluate` as text."""

from collections.abc import Sequence

from lit_llm import names
from lit_llm.evaluation.material import escaped
from lit_llm.evaluation.result import Difference, Figure, Result

SHOWN = ("nll", "perplexity", "bits_per_byte", "token_accuracy")    # of each source, and of several models


def of(results: Sequence[Result], differences: Sequence[Difference]) -> str:
    """The text of an evaluation: one model in full, several as a table, then the differences."""
    models = [result for result in results if not result.is_base]
    lines = _whole(models[0]) if len(models) == 1 else _beside(models)
    for difference in differences:
        lines += ["", *_difference(difference)]
    shown = [figure for result in models for figure in result.figures().values()]
    if any(figure.low is not None and not figure.reliable for figure in shown):
        lines += ["", "?: too few documents for the interval to cover 95 %"]
    return "\n".join(lines)


def _whole(result: Result) -> list[str]:
    lines = [*_measured(result), ""]
    for name, figure in result.figures().items():
        value, count = _number(figure.value), f"{figure.count:,} {figure.unit}"
        lines.append(f"  {name:<19}{value:>10}  {_interval(figure):<22}  {count}")
    groups: dict[str, dict[str, dict[str, float]]] = {"source": {
        _end(escaped(name), 38): {key: figure.value for key, figure in figures.items()}
        for name, figures in result.by_source().items()}}
    groups |= {name.removesuffix("s"): values for name, values in result.details.items()}
    for title, parts in groups.items():
        if parts:
            lines += ["", f"  {'by ' + title:<40}" + "".join(f"{name:>16}" for name in SHOWN)]
        for name, values in parts.items():
            cells = (_number(values[key]) if key in values else "-" for key in SHOWN)
            lines.append(f"  {name:<40}" + "".join(f"{cell:>16}" for cell in cells))
    return lines


def _measured(result: Result) -> list[str]:
    facts, units = result.measured, result.units
    model, windows = facts["model"], facts["windows"]
    kinds = {"adapter": f"adapter on {names.shown(str(model.get('base')))}", "server": f"{model.get('name')}, served"}
    kind = kinds.get(model["kind"], "model")
    extra = ", ".join(str(model[key]) for key in ("dtype", "quantize") if model.get(key))
    notes = "".join(f"; {count:,} {name}" for name, count in result.notes.items())
    return [f"{escaped(result.name)}: {escaped(kind)}{', ' + extra if extra else ''}",
            f"  {', '.join(map(escaped, facts['sources']))}: {int((units.tokens > 0).sum()):,} documents or "
            f"conversations, {int(units.tokens.sum()):,} scored tokens{notes}",
            "  " + ", ".join(f"{name} {value}" for name, value in windows.items()) + "; 95 % intervals over documents"]


def _beside(results: Sequence[Result]) -> list[str]:
    """One line for each model; differences follow."""
    lines = []
    for result in results:
        lines += _measured(result)
    width = max(len(result.name) for result in results) + 2
    every = [result.figures() for result in results]
    names = [name for name in ("word_perplexity", *SHOWN) if any(name in figures for figures in every)]
    lines += ["", f"  {'':<{width}}" + "".join(f"{name:>18}" + " " * 20 for name in names).rstrip()]
    for result, figures in zip(results, every, strict=True):
        cells = [f"{_number(figures[name].value):>18} {_interval(figures[name]):<19}" if name in figures else
                 f"{'-':>18}" + " " * 20 for name in names]
        lines.append(f"  {escaped(result.name):<{width}}" + "".join(cells).rstrip())
    return lines


def _difference(difference: Difference) -> list[str]:
    nll = difference.nll
    share = difference.worse / difference.documents
    lines = [f"{escaped(difference.name)} against {escaped(difference.before)}: nll {_change(nll.value)} "
             f"{_signed(nll)}; {difference.worse:,} of {difference.documents:,} ({share:.1%}) are worse"]
    if difference.worst:
        lines.append("  worst, in nats per token:")
    for one in difference.worst:
        place = escaped(names.shown(one["place"] or one["source"]))
        lines.append(f"    {one['nll'] - one['before']:+.3f}  {one['before']:.3f} -> {one['nll']:.3f}  "
                     f"number {one['unit']}, {_end(place, 60)}: {one['excerpt'][:90]}")
    return lines


def _number(value: float) -> str:
    return f"{value:,.4f}" if abs(value) < 1e5 else f"{value:.4g}"


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return "[no interval]"
    return f"[{_number(figure.low)}, {_number(figure.high)}]{'' if figure.reliable else ' ?'}"


def _signed(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return "[no interval]"
    return f"[{_change(figure.low)}, {_change(figure.high)}]{'' if figure.reliable else ' ?'}"


def _change(value: float) -> str:
    """With its sign, except of one that is shown as 0.

    >>> _change(-0.25), _change(-1e-9)
    ('-0.2500', '0.0000')
    """
    shown = f"{value:+.4f}"
    return shown if float(shown) else shown[1:]


def _end(text: str, most: int) -> str:
    """The end of a path, which tells more than its beginning."""
    return text if len(text) <= most else "..." + text[3 - most:]
