"""Colours, markers, lines and axes that the figures share."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from undo_core.report.metrics import ModelReport, Report
from undo_core.report.robustness import DIVERGED

# Okabe and Ito's colours, safe for colour-blind readers; UNDO students use a ramp of blues, darker with alpha.
COLOURS = {"original": "#5b5b5b", "unlearn": "#D55E00", "random": "#CC79A7", "filter": "#009E73", "oracle": "#E69F00"}
COLOURS |= {"damaged": "#56B4E9", "gated": "#7b3294", "oracle-random": "#b8860b"}
# Colours of things that have no colour of their own, such as methods: Okabe and Ito's, and one more.
DISTINCT = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a6d00")
MARKERS = {"original": "X", "unlearn": "s", "undo": "o", "random": "D", "filter": "^", "oracle": "v"}
MARKERS |= {"damaged": "P", "gated": "h", "oracle-random": "<", "defence": "o"}
LINES = {"unlearn": "-", "undo": "-", "random": (0, (4, 1.5)), "filter": (0, (1, 1)), "oracle": (0, (5, 1, 1, 1))}
LINES |= {"defence": "-", "damaged": (0, (2, 1)), "gated": (0, (3, 1, 1, 1, 1, 1)), "oracle-random": (0, (1, 2))}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.linewidth": 0.8,
    "axes.labelcolor": "#222222",
    "axes.titlesize": 10.5,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.9,
    "lines.solid_capstyle": "round",
}
DPI = 180
LABEL_SIZE = 9  # points


def png(figure: Figure) -> bytes:
    """Renders the figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **shared: bool) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its panels, row by row; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def unit_name(report: Report) -> str:
    """Axis label of a performance, with its unit."""
    return f"{'accuracy' if report.higher else 'loss'}, {report.unit}"


def finite(value: float) -> float:
    """Replaces the value of a model that diverged with NaN, which leaves a gap in a plot."""
    return value if value < DIVERGED else float("nan")


def scale(axis: Any, axes: Axes, report: Report) -> None:
    """Scales an accuracy axis from 0 to 100 per cent; leaves a loss axis unchanged."""
    if report.higher:
        vertical = axis is axes.yaxis
        (axes.set_ylim if vertical else axes.set_xlim)(-0.025, 1.025)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}" if value < 1.001 else ""))


def step_panels(figure: Figure, panels: list[Axes], used: int, columns: int, last: float, report: Report) -> None:
    """Scales and labels panels of forget performance against attack steps up to ``last``; hides those beyond ``used``."""
    for index, axes in enumerate(panels[:used]):
        axes.tick_params(labelsize=8.5, labelbottom=index + columns >= used)
        axes.set_xlim(0, last or 1)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        scale(axes.yaxis, axes, report)
    for axes in panels[used:]:
        axes.set_visible(False)
    figure.supxlabel("attack step", fontsize=10.5)
    figure.supylabel(f"forget {unit_name(report)}", fontsize=10.5)


def colours_of(report: Report) -> dict[str, Any]:
    """``{model name: colour}``."""
    undo = [model.name for model in report.of("undo")]
    ramp = {name: colormaps["Blues"](0.45 + 0.55 * (i + 1) / len(undo)) for i, name in enumerate(undo)}
    ramp |= {model.name: DISTINCT[i % len(DISTINCT)] for i, model in enumerate(report.of("defence"))}
    return {model.name: ramp.get(model.name) or COLOURS[model.kind] for model in report.models}


def recovery(model: ModelReport) -> str:
    """What follows the name of a model in a figure that did not recover its retain performance in some seed; else empty."""
    return " (did not recover)" if model.censored else ""


def legend_columns(report: Report, most: int = 3) -> int:
    """Columns of a legend of models: two where the name of one is long because it did not recover."""
    return 2 if any(model.censored for model in report.models) else most


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, Any]]) -> None:
    """Writes names to the right of the axes, each at its value and in its colour, moved apart where they would overlap.

    Call it last: what else the figure shows decides how high the axes are.

    Args:
        ends: value, name and colour of each; those whose value is NaN are left out.
    """
    ends = sorted((e for e in ends if e[0] == e[0]), key=lambda end: end[0])
    bottom, top = axes.get_ylim()
    axes.figure.draw_without_rendering()  # lays the figure out
    line_height = 1.25 * LABEL_SIZE * axes.figure.dpi / 72 / axes.bbox.height  # as a share of the axes
    places = spread_apart([end[0] for end in ends], max(0.062, line_height) * (top - bottom), bottom, top)
    for place, (value, text, colour) in zip(places, ends, strict=True):
        line = {
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.7,
            "shrinkA": 0,
            "shrinkB": 1,
            "alpha": 0.7,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            text,
            (1, value),
            (1.06, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=LABEL_SIZE,
            color=colour,
            arrowprops=line,
            annotation_clip=False,
        )


def spread_apart(values: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """Moves ascending ``values`` as little as possible (least squares) so that neighbours are ``gap`` apart within the range.

    After subtracting ``gap * index`` this is isotonic regression: neighbours in the wrong order are pooled at their mean.
    """
    pools: list[list[float]] = []
    for index, value in enumerate(values):
        pools.append([value - index * gap])
        while len(pools) > 1 and statistics.fmean(pools[-2]) > statistics.fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    highest = top - (len(values) - 1) * gap
    levels = [max(bottom, min(statistics.fmean(pool), highest)) for pool in pools for _ in pool]
    return [level + index * gap for index, level in enumerate(levels)]
