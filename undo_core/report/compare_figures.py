"""Figures of the comparison report; they draw the points of ``points.csv`` and nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from undo_core.report.metrics import LABELS, STUDENTS
from undo_core.report.points import FIGURES, PlotPoint, Setting
from undo_core.report.style import (
    COLOURS,
    DISTINCT,
    LINES,
    MARKERS,
    STYLE,
    finite,
    new_figure,
    png,
    scale,
    step_panels,
    unit_name,
)
from undo_core.report.table import count

UNDO = "#08519c"
KIND_COLOURS = {**COLOURS, "undo": UNDO}
KIND_NAMES = {**LABELS, "undo": "UNDO", "damaged": "other damage"}
HALO = [withStroke(linewidth=3, foreground="white")]
GREY = "#bbbbbb"

Points = Sequence[PlotPoint]


def draw(settings: Sequence[Setting], points: Points) -> dict[str, bytes]:
    """Draws every figure that has points; returns ``{name: PNG}`` in the order of the page."""
    drawn: dict[str, bytes] = {}
    with matplotlib.rc_context(STYLE):
        for name in FIGURES:
            own = [point for point in points if point.figure == name]
            if own:
                drawn[name] = png(_DRAW[name](settings, own))
    return drawn


def overview(settings: Sequence[Setting], points: Points) -> Figure:
    """Bars of retain and forget performance of unlearn only and UNDO, before (light) and after the attack (solid)."""
    report = settings[0].report
    labels = [setting.label for setting in settings]
    figure, panels = new_figure(max(5.8, 1.9 + 1.05 * len(labels)), 5.6, 2, 1, sharex=True)
    width, bars = 0.19, [("unlearn", "before"), ("unlearn", "after"), ("undo", "before"), ("undo", "after")]
    for axes, panel in zip(panels, ("retain", "forget"), strict=True):
        for slot, (kind, when) in enumerate(bars):
            for place, label in enumerate(labels):
                ys = _values(points, panel, f"{kind}, {when}", label)
                if not ys:
                    continue
                x, mean = place + (slot - 1.5) * width * 1.07, statistics.fmean(ys)
                axes.bar(x, mean, width, color=KIND_COLOURS[kind], alpha=0.4 if when == "before" else 1.0, linewidth=0)
                if len(ys) > 1:
                    axes.plot([x, x], [min(ys), max(ys)], color="#222222", linewidth=1, zorder=4)
        for kind, when, dashes in (("original", "before", (0, (2, 2))), ("filter", "after", "-")):
            for place, label in enumerate(labels):
                ys = _values(points, panel, f"{kind}, {when}", label)
                if ys:
                    mean, reach = statistics.fmean(ys), 0.46
                    line = {"color": KIND_COLOURS[kind], "linestyle": dashes, "linewidth": 1.6, "zorder": 5}
                    axes.plot([place - reach, place + reach], [mean, mean], solid_capstyle="butt", **line)
        axes.set_ylabel(f"{panel} {unit_name(report)}")
        scale(axes.yaxis, axes, report)
        if report.higher:
            axes.set_ylim(0, 1.04)
        axes.grid(axis="x", visible=False)
        better = (panel == "retain") is report.higher
        axes.set_title("higher is better ↑" if better else "lower is better ↓", loc="right", fontsize=9, color="#777777")
    names = [_wrap(label) for label in labels]
    crowded = len(labels) > 1 and max(len(line) for name in names for line in name.split("\n")) > 15
    turned = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    panels[-1].set_xticks(range(len(labels)), names, fontsize=9, **turned)
    panels[-1].tick_params(axis="x", length=0)
    panels[-1].set_xlim(-0.6, len(labels) - 0.4)
    after = f"after {report.headline} attack steps"
    handles: list[Any] = []
    for kind in ("unlearn", "undo"):
        for when, alpha in (("before the attack", 0.4), (after, 1.0)):
            handles.append(Patch(color=KIND_COLOURS[kind], alpha=alpha, linewidth=0, label=f"{KIND_NAMES[kind]}, {when}"))
    known = {point.series for point in points}
    if "filter, after" in known:
        handles.append(Line2D([], [], color=KIND_COLOURS["filter"], linewidth=1.6, label=f"data filtering, {after}"))
    if "original, before" in known:
        style = {"color": KIND_COLOURS["original"], "linewidth": 1.6, "linestyle": (0, (2, 2))}
        handles.append(Line2D([], [], label="original, not attacked", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(labels) < 6 else 3, fontsize=8.5)
    return figure


def curves(settings: Sequence[Setting], points: Points) -> Figure:
    """Relearning curves, one panel per method: the worst case as a line, and a band to the weakest attack; means over seeds."""
    report = settings[0].report
    labels = list(dict.fromkeys(point.panel for point in points))
    columns = min(len(labels), 4 if len(labels) > 6 else 3)
    rows = -(-len(labels) // columns)
    figure, panels = new_figure(max(4.6, 2.35 * columns + 0.6), 2.25 * rows + 1.3, rows, columns, sharex=True, sharey=True)
    kinds = list(dict.fromkeys(point.series.partition(",")[0] for point in points))
    for axes, label in zip(panels, labels, strict=False):
        for kind in kinds:
            worst, weakest = (
                _line([p for p in points if p.panel == label and p.series == series]) for series in (kind, f"{kind}, weakest")
            )
            if worst:
                colour, steps = KIND_COLOURS[kind], [step for step in worst if step in weakest]
                low, high = ([line[step] for step in steps] for line in (weakest, worst))
                axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
                mark = {"marker": MARKERS[kind], "markersize": 4, "linewidth": 1.6, "clip_on": False}
                axes.plot(list(worst), list(worst.values()), color=colour, linestyle=LINES[kind], **mark)
        axes.axvline(report.headline, color=GREY, linewidth=0.9, zorder=1)
        if len(settings) > 1:
            axes.set_title(_wrap(label, 26), fontsize=9.5)
    step_panels(figure, panels, len(labels), columns, max(point.x for point in points), report)
    handles: list[Any] = [
        Line2D(
            [], [], color=KIND_COLOURS[kind], linestyle=LINES[kind], marker=MARKERS[kind], markersize=5, label=KIND_NAMES[kind]
        )
        for kind in kinds
    ]
    handles.append(
        Patch(
            color="#888888",
            alpha=0.25,
            linewidth=0,
            label="down to the weakest attack" if report.higher else "up to the weakest attack",
        )
    )
    handles.append(Line2D([], [], color=GREY, linewidth=0.9, label=f"headline: {report.headline} steps"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 2 if columns < 3 else 3), fontsize=8.5)
    return figure


def methods(settings: Sequence[Setting], points: Points) -> Figure:
    """Forget against retain performance, before and after the attack; a line connects unlearning alone with UNDO."""
    report = settings[0].report
    figure, panels = new_figure(8.4, 4.6, 1, 2)
    colours = _method_colours([setting.label for setting in settings])
    for axes, panel in zip(panels, ("before", "after"), strict=True):
        for label, colour in colours.items():
            ends = []
            for kind in ("filter", "unlearn", "undo"):
                own = [p for p in points if p.panel == panel and p.series == f"{label}, {kind}"]
                if not own:
                    continue
                xs, ys = [finite(float(p.x)) for p in own], [finite(p.y) for p in own]
                x, y = statistics.fmean(xs), statistics.fmean(ys)
                shade = COLOURS["filter"] if kind == "filter" else colour
                mark = {"marker": MARKERS[kind], "color": shade, "markersize": 8, "linestyle": "none"}
                axes.plot(x, y, markerfacecolor="white" if kind == "filter" else shade, alpha=0.9, zorder=4, **mark)
                if len(own) > 1:
                    spread = {"color": shade, "linewidth": 0.8, "alpha": 0.6, "zorder": 2}
                    axes.plot([min(xs), max(xs)], [y, y], **spread)
                    axes.plot([x, x], [min(ys), max(ys)], **spread)
                if kind != "filter":
                    ends.append((x, y))
            if len(ends) == 2:
                axes.plot(*zip(*ends, strict=True), color=colour, linewidth=1, alpha=0.5, zorder=2)
        axes.set_title("before the attack" if panel == "before" else f"after {report.headline} attack steps", fontsize=10)
        axes.set_xlabel(f"retain {unit_name(report)}")
        scale(axes.yaxis, axes, report)
        scale(axes.xaxis, axes, report)
        axes.set_title("better ↘" if report.higher else "better ↖", loc="right", fontsize=9, color="#777777")
    if report.higher:  # zoom to the points: before the attack all are in one corner
        for axes, panel in zip(panels, ("before", "after"), strict=True):
            own = [p for p in points if p.panel == panel]
            axes.set_xlim(max(-0.025, min((float(p.x) for p in own), default=0.0) - 0.06), 1.025)
            top = max([0.1, *(p.y for p in own)])
            if top < 0.5:
                axes.set_ylim(-0.06 * top, 1.15 * top)
    for axes in panels:
        axes.set_ylabel(f"forget {unit_name(report)}")
    drawn = {point.series.rpartition(", ")[2] for point in points}
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in colours.items()]
    handles += [
        Line2D([], [], color="#555555", marker=MARKERS[kind], linestyle="none", markersize=7, label=KIND_NAMES[kind])
        for kind in ("unlearn", "undo", "filter")
        if kind in drawn
    ]
    if "filter" in drawn:
        handles[-1].set(color=COLOURS["filter"], markerfacecolor="white")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8.5, columnspacing=1.2)
    return figure


def robustness(settings: Sequence[Setting], points: Points) -> Figure:
    """R against C by alpha: means, with bars from the smallest to the largest seed."""
    units = [unit for unit in ("steps", "flops") if any(point.panel == unit for point in points)]
    figure, panels = new_figure(4.1 * len(units) + (1.2 if len(units) == 1 else 0), 4.5, 1, len(units), sharey=True)
    colours = _method_colours([setting.label for setting in settings])
    models = [(setting.label, model) for setting in settings for model in setting.report.models]
    if len(settings) == 1:
        colours = dict.fromkeys(colours, UNDO)
    lowest, highest = 0.0, 1.0
    for axes, unit in zip(panels, units, strict=True):
        axes.axline((0, 0), (1, 1), color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        axes.plot(1, 1, marker=MARKERS["filter"], color=COLOURS["filter"], markersize=9, linestyle="none", zorder=3)
        right, written = 1.0, list[tuple[float, float]]()
        for label, colour in colours.items():
            line = []
            for model in (model for owner, model in models if owner == label):
                own = [p for p in points if p.panel == unit and p.series == f"{label}, {model.name}"]
                if not own:
                    continue
                xs, ys = [float(p.x) for p in own], [p.y for p in own]
                x, y = statistics.fmean(xs), statistics.fmean(ys)
                right, lowest, highest = max(right, *xs), min(lowest, *ys), max(highest, *ys)
                if len(own) > 1:
                    axes.errorbar(
                        x,
                        y,
                        xerr=[[x - min(xs)], [max(xs) - x]],
                        yerr=[[y - min(ys)], [max(ys) - y]],
                        color=colour,
                        linewidth=1,
                        capsize=2,
                        alpha=0.7,
                        zorder=2,
                    )
                axes.plot(x, y, marker=MARKERS[model.kind], color=colour, markersize=7, linestyle="none", zorder=4)
                if model.kind == "undo":
                    line.append((x, y))
                    place = {"textcoords": "offset points", "ha": "right", "fontsize": 8.5, "path_effects": HALO, "zorder": 5}
                    if all(abs(x - x0) > 0.07 or abs(y - y0) > 0.05 for x0, y0 in written):  # skip labels that would overlap
                        axes.annotate(f"{model.alpha:g}", (x, y), (-6, 5), color=colour, **place)
                        written.append((x, y))
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.1, alpha=0.6, zorder=2)
        axes.set_xlim(-0.06 * right, right * 1.08)
        axes.set_xlabel(f"C, {'FLOPs' if unit == 'flops' else 'training steps'} / data filtering's")
    panels[0].set_ylim(lowest - 0.08, highest + 0.12)
    panels[0].set_ylabel("R, robustness to relearning")
    handles = [Line2D([], [], color=colour, linewidth=3, label=label) for label, colour in colours.items()]
    handles = handles if len(settings) > 1 else []
    known = [kind for kind in STUDENTS if any(model.kind == kind and model.robustness for _, model in models)]
    for kind in known:
        name = "UNDO (number: α)" if kind == "undo" else KIND_NAMES[kind]
        handles.append(Line2D([], [], color="#555555", marker=MARKERS[kind], linestyle="none", markersize=7, label=name))
    filtering = {"color": COLOURS["filter"], "marker": MARKERS["filter"], "linestyle": "none", "markersize": 7}
    handles.append(Line2D([], [], label="data filtering", **filtering))
    handles.append(Line2D([], [], color=GREY, linestyle=(0, (3, 3)), linewidth=1, label="R = C"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 2 * len(units) + 1), fontsize=8.5)
    return figure


def labels(settings: Sequence[Setting], points: Points) -> Figure:
    """Forget performance after the attack, and R, against the labelled forget tokens."""
    report = settings[0].report
    panels = [panel for panel in ("forget", "R") if any(point.panel == panel for point in points)]
    figure, all_axes = new_figure(4.2 * len(panels) + (1 if len(panels) == 1 else 0), 4.2, 1, len(panels))
    series = list(dict.fromkeys(point.series for point in points))
    several = len({name.rpartition(", ")[0] for name in series}) > 1
    shades = _method_colours(list(dict.fromkeys(name.rpartition(", ")[0] for name in series)))
    handles = []
    for name in series:
        method, _, kind = name.rpartition(", ")
        colour = shades[method] if several else KIND_COLOURS[kind]
        style = {"color": colour, "marker": MARKERS[kind], "linestyle": LINES[kind], "markersize": 6}
        handles.append(Line2D([], [], label=f"{method}, {KIND_NAMES[kind]}" if several else KIND_NAMES[kind], **style))
        for axes, panel in zip(all_axes, panels, strict=True):
            budgets = _by_x([p for p in points if p.panel == panel and p.series == name])
            if budgets:
                means = [statistics.fmean(ys) for ys in budgets.values()]
                axes.plot(list(budgets), means, linewidth=1.5, **style)
                for x, ys in budgets.items():
                    axes.plot([x, x], [min(ys), max(ys)], color=colour, linewidth=1)
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_xscale("log")
        ticks = sorted({point.x for point in points})
        axes.set_xticks(ticks, [count(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("labelled forget tokens")
        if panel == "forget":
            axes.set_ylabel(f"forget {unit_name(report)}, after {report.headline} attack steps")
            scale(axes.yaxis, axes, report)
        else:
            axes.set_ylabel("R, robustness to relearning")
            axes.set_ylim(min(0.0, *axes.get_ylim()), max(1.0, *axes.get_ylim()))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3), fontsize=8.5)
    return figure


_DRAW: dict[str, Callable[[Sequence[Setting], Points], Figure]] = {
    "overview": overview,
    "oracle": curves,
    "methods": methods,
    "envelopes": curves,
    "robustness": robustness,
    "labels": labels,
}


def _values(points: Points, panel: str, series: str, x: str) -> list[float]:
    """Finite values of one series at one x."""
    found = [finite(p.y) for p in points if p.panel == panel and p.series == series and p.x == x]
    return [value for value in found if value == value]


def _by_x(points: Iterable[PlotPoint]) -> dict[Any, list[float]]:
    """Values of the seeds at each x, in order of x."""
    found: dict[Any, list[float]] = {}
    for point in sorted(points, key=lambda point: point.x):
        found.setdefault(point.x, []).append(finite(point.y))
    return found


def _line(points: Iterable[PlotPoint]) -> dict[Any, float]:
    """Mean over seeds at each x."""
    return {x: statistics.fmean(values) for x, values in _by_x(points).items()}


def _method_colours(names: Sequence[str]) -> dict[str, Any]:
    if len(names) <= len(DISTINCT):
        return dict(zip(names, DISTINCT, strict=False))
    for known in (colormaps["tab10"].colors, colormaps["tab20"].colors):
        if len(names) <= len(known):
            return dict(zip(names, known, strict=False))
    return {name: colormaps["viridis"](0.95 * index / (len(names) - 1)) for index, name in enumerate(names)}


def _wrap(label: str, width: int = 12) -> str:
    """Breaks a label at spaces into lines of at most ``width`` characters."""
    lines = [""]
    for word in label.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
