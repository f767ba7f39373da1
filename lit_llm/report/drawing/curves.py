"""Draw curves of metrics over optimizer steps as plain SVG; all texts are escaped."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llm.report.rows import MEMORY, SPEED

ENDS = ("_low", "_high")                            # suffixes of the ends of a metric's interval
WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 14, 30           # margins
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#b83280", "#6b46c1", "#975a16")     # the page replaces them in dark mode
# The charts in their order: key of its title, and the metrics that it shows, with those below them.
CHARTS = (("loss", ("train/loss", "train/aux_loss")), ("nll", ("val/nll",)), ("lr", ("train/lr",)),
          ("rise", ("guard/rise",)), ("guard", ("guard/nll",)), ("grad_norm", ("train/grad_norm",)),
          ("speed", (SPEED,)), ("memory", (MEMORY,)))
UNCHARTED = ("val/tokens", "test/tokens", "guard/tokens", "val/documents", "test/documents")        # constant
PICTURED = ("loss", "nll", "rise")                  # charts of the model card


@dataclass(frozen=True, slots=True)
class Series:
    """A curve.

    Args:
        name: Its name in the legend.
        steps: Optimizer steps, ascending.
        values: A finite value for each.
        band: Step -> ends of the interval of its value.
    """

    name: str
    steps: list[int]
    values: list[float]
    band: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the same axes.

    Args:
        key: Key of its title in the catalogue of texts; empty if the title is the metric's name.
        name: Name of its first metric.
        series: At least one curve, each with at least one point.
    """

    key: str
    name: str
    series: list[Series]


def charts(facts: dict[str, Any]) -> list[Chart]:
    """The charts of a run: the known ones first, then one for each other metric.

    Args:
        facts: The values of `report.json`.
    """
    left = series_of(facts)
    charts = []
    for key, names in CHARTS:
        of_chart = [name for name in left if name in names or name.startswith(tuple(f"{one}/" for one in names))
                    or (key == "lr" and name.startswith("lr-"))]       # names of Lightning's monitor
        if of_chart:
            charts.append(Chart(key, of_chart[0], [left.pop(name) for name in of_chart]))
    return charts + [Chart("", name, [series]) for name, series in left.items()]


def series_of(facts: dict[str, Any]) -> dict[str, Series]:
    """The curve of each metric of a run, with its interval, in the order of the metrics."""
    points = {curve["name"]: dict(zip(curve["steps"], curve["values"], strict=True)) for curve in facts["curves"]
              if curve["steps"]}
    by_name = {}
    for name, curve in points.items():
        if name in UNCHARTED or (name.endswith(ENDS) and name.rpartition("_")[0] in points):
            continue
        low, high = (points.get(name + end, {}) for end in ENDS)
        band = {step: (low[step], high[step]) for step in curve if step in low and step in high}
        by_name[name] = Series(name, list(curve), list(curve.values()), band)
    return by_name


def svg(chart: Chart, best: int | None = None, label: str = "") -> str:
    """One chart; its `viewBox` is 0 0 WIDTH HEIGHT.

    Args:
        chart: The chart.
        best: Step of the best checkpoint, which is marked; null marks none.
        label: Description for screen readers.
    """
    across, up = Scale.of(chart)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{_safe(label)}" '
             'font-family="system-ui, sans-serif" font-size="12">']
    for value in up.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up.at(value):.1f}" '
                     f'y2="{up.at(value):.1f}" stroke="#8884"/>'
                     f'<text class="tick" x="{LEFT - 8}" y="{up.at(value) + 4:.1f}" text-anchor="end" fill="#777">'
                     f'{number(value)}</text>')
    for value in across.ticks():
        parts.append(f'<text class="tick" x="{across.at(value):.1f}" y="{HEIGHT - 10}" text-anchor="middle" '
                     f'fill="#777">{number(value)}</text>')
    if best is not None and across.low <= best <= across.high:
        parts.append(f'<line class="best" x1="{across.at(best):.1f}" x2="{across.at(best):.1f}" y1="{TOP}" '
                     f'y2="{HEIGHT - BOTTOM}" stroke="#777" stroke-dasharray="4 4"/>'
                     f'<text class="tick" x="{across.at(best):.1f}" y="{TOP - 2}" text-anchor="middle" fill="#777">★'
                     '</text>')
    for place, series in enumerate(chart.series):
        colour = place % len(COLOURS)
        points = [(across.at(step), up.at(value)) for step, value in zip(series.steps, series.values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if series.band:
            ends = [[(across.at(step), up.at(ends[which])) for step, ends in series.band.items()] for which in (0, 1)]
            outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*ends[0], *reversed(ends[1])])
            parts.append(f'<polygon class="s{colour}" points="{outline}" fill="{COLOURS[colour]}" fill-opacity="0.18" '
                         f'stroke="{COLOURS[colour]}" stroke-opacity="0.35" stroke-width="1"/>')
        parts.append(f'<polyline class="s{colour}" points="{path}" fill="none" stroke="{COLOURS[colour]}" '
                     'stroke-width="1.8" stroke-linejoin="round"/>')
        parts += [f'<circle class="s{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{COLOURS[colour]}"/>'
                  for x, y in points if len(points) <= 40]
    return "".join([*parts, "</svg>"])


def picture(facts: dict[str, Any]) -> str:
    """The main curves as one SVG file for a model card; empty if the run has none."""
    if not (drawn := pictured(facts)):
        return ""
    best = best_step(facts)
    boxes = []
    for place, chart in enumerate(drawn):
        names = ", ".join(series.name for series in chart.series)
        boxes.append(f'<text x="{LEFT}" y="{place * (HEIGHT + 30) + 22}" font-family="system-ui, sans-serif" '
                     f'font-size="14" fill="#222">{_safe(names)}</text>'
                     + svg(chart, best, names).replace("<svg ", f'<svg x="0" y="{place * (HEIGHT + 30) + 28}" '
                                                       f'width="{WIDTH}" height="{HEIGHT}" ', 1))
    height = len(drawn) * (HEIGHT + 30) + 8
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(boxes)}</svg>\n')


def pictured(facts: dict[str, Any]) -> list[Chart]:
    """The charts of a model card."""
    return [chart for chart in charts(facts) if chart.key in PICTURED]


def best_step(facts: dict[str, Any]) -> int | None:
    """Step of the best checkpoint; null if there is none."""
    return next((entry["step"] for entry in facts["checkpoints"] if entry["best"]), None)


def values_of(drawn: Sequence[Chart]) -> list[dict[str, Any]]:
    """The points of charts with the scales of their axes, for the page's pointer and keyboard."""
    entries = []
    for chart in drawn:
        across, up = Scale.of(chart)
        entries.append({"x": [across.low, across.high, across.first, across.last],
                        "y": [up.low, up.high, up.first, up.last],
                        "series": [{"name": series.name, "steps": series.steps,
                                    "values": [float(f"{value:.6g}") for value in series.values],
                                    "band": [[float(f"{end:.4g}") for end in series.band[step]]
                                             if step in series.band else None for step in series.steps]
                                    if series.band else None}
                                   for series in chart.series]})
    return entries


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear axis: `low` is at the coordinate `first`, `high` at `last`."""

    low: float
    high: float
    first: float
    last: float

    @classmethod
    def of(cls, chart: Chart) -> tuple["Scale", "Scale"]:
        """The axes of a chart: steps, and values with a margin."""
        steps = [step for series in chart.series for step in series.steps]
        values = [value for series in chart.series for value in series.values]
        values += [end for series in chart.series for ends in series.band.values() for end in ends]
        low, high = min(values), max(values)
        if not math.isfinite(high - low):           # values at the ends of the range of float
            low, high = low / 4, high / 4
        room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        return (cls(min(steps), max(max(steps), min(steps) + 1), LEFT, WIDTH - RIGHT),
                cls(low - room, high + room, HEIGHT - BOTTOM, TOP))

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self, most: int = 5) -> list[float]:
        """Round values on the axis."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
        first = math.ceil(self.low / step)
        return [place * step for place in range(first, first + most + 3) if place * step <= self.high]


def number(value: float) -> str:
    """A number for an axis, short.

    >>> [number(value) for value in (0, 0.00002, 0.25, 1200, 2500000)]
    ['0', '2e-05', '0.25', '1200', '2.5M']
    """
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if size <= abs(value) < size * 1000:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _safe(text: str) -> str:
    return html.escape("".join(char for char in text if char.isprintable()))
