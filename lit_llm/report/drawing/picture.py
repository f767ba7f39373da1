"""Draw the main curves of a run as PNG with matplotlib, for model cards on sites that show no SVG.

matplotlib is used where it is installed; without it, model cards show an SVG.
"""

import io
from collections.abc import Sequence
from importlib.util import find_spec

from lit_llm.report.drawing.curves import COLOURS, Chart

INCHES = (6.4, 2.6)                                 # of each chart
DPI = 200


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def png(drawn: Sequence[Chart], best: int | None = None) -> bytes:
    """Charts below each other.

    Args:
        drawn: At least one chart.
        best: Step of the best checkpoint, which is marked; null marks none.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], INCHES[1] * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)                         # not pyplot, which may open a window and has a global state
    for chart, axes in zip(drawn, figure.subplots(len(drawn), squeeze=False)[:, 0], strict=True):
        for number, series in enumerate(chart.series):
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(series.steps, series.values, color=colour, linewidth=1.4, label=_plain(series.name),
                      marker="o" if len(series.steps) <= 40 else None, markersize=2.5)
            if series.band:
                low, high = zip(*series.band.values(), strict=True)
                axes.fill_between(list(series.band), low, high, color=colour, alpha=0.18, linewidth=0)
        if best is not None:
            axes.axvline(best, color="#777", linestyle="--", linewidth=0.9)
        axes.grid(color="#8884", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
        axes.tick_params(labelsize=8)
    figure.axes[-1].set_xlabel("optimizer step", fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    return content.getvalue()


def _plain(name: str) -> str:
    """A name without the markup of formulas and the leading underscore that hides an entry of a legend."""
    return name.replace("$", r"\$").lstrip("_")
