"""What models still hold inside, and interventions over their grids: curves and a table of the results."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from undo_core.report.metrics import ModelReport, Report, Stat
from undo_core.report.style import MARKERS, colours_of, finite, new_figure, scale, unit_name
from undo_core.report.table import Cell, Table, performance

COLUMNS = 2  # panels in a row


def measures_of(report: Report) -> dict[str, dict[str, Any]]:
    """What each measure shows (kind, text, axis, value, summary), by its name."""
    found: dict[str, dict[str, Any]] = {}
    for _, entry in _entries(report):
        for name, own in (entry.get("measures") or {}).items():
            found.setdefault(name, own)
    return found


def measure_table(report: Report) -> Table:
    """Table of the number of each measure beside the attack's outcome, one row per model, as means over seeds.

    It has no rows without measures.
    """
    measures = measures_of(report)
    after = f"forget after {report.headline} steps"
    headers = [
        ("model", ""),
        (after, f"worst case, {report.unit}"),
        *((name, f"{own['summary']}{_text(own)}") for name, own in measures.items()),
    ]
    rows = []
    for model in report.models:
        cells = [_number_cell(model, name) for name in measures]
        if any(cell != Cell() for cell in cells):
            worst = performance(model.worst.get(report.headline, Stat()), report.higher)
            rows.append([Cell(model.label), worst, *cells])
    return Table(headers, rows if measures else [])


def inside(report: Report) -> Figure | None:
    """The curve of each measure, a panel each, with a line per model."""
    measures = measures_of(report)
    if not measures:
        return None
    figure, panels = _panels(len(measures))
    colours = colours_of(report)
    shown: dict[str, Line2D] = {}
    for axes, (name, own) in zip(panels, measures.items(), strict=False):
        for model in report.models:
            xs, ys = _mean_curve(model, name)
            if xs:
                (shown[model.label],) = _line(axes, xs, ys, model, colours)
        axes.set_title(f"{name}{_text(own)}", fontsize=9.5, loc="left")
        axes.set_xlabel(own["axis"])
        axes.set_ylabel(own["value"])
        if own["axis"] == "layer":
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _legend(figure, list(shown.values()), list(shown))
    return figure


def interventions(report: Report) -> Figure | None:
    """Forget (filled) and retain (open) performance over the grid of each intervention, at the worst of its other settings."""
    names = list(dict.fromkeys(name for _, entry in _entries(report) for name in _interventions(entry)))
    if not names:
        return None
    figure, panels = _panels(len(names))
    colours = colours_of(report)
    shown: dict[str, Line2D] = {}
    for axes, name in zip(panels, names, strict=False):
        for model in report.models:
            points = _grid(model, name, report.higher)
            for part, style in (("forget", {}), ("retain", {"markerfacecolor": "white", "alpha": 0.5})):
                xs = sorted(points)
                ys = [finite(sum(p[part] for p in points[x]) / len(points[x])) for x in xs]
                if xs:
                    (line,) = _line(axes, xs, ys, model, colours, **style)
                    shown.setdefault(model.label, line)
        first = next(own for _, entry in _entries(report) if (own := _interventions(entry).get(name)))
        axes.set_title(f"{name} ({first['kind']})", fontsize=9.5, loc="left")
        axes.set_xlabel(next(iter(first["curves"][0]["point"])))
        axes.set_ylabel(unit_name(report))
        scale(axes.yaxis, axes, report)
    _legend(figure, list(shown.values()), list(shown))
    return figure


def captions(report: Report) -> dict[str, str]:
    """A caption for each figure that this module draws."""
    worst = "largest forget accuracy" if report.higher else "smallest forget loss"
    return {
        "inside": "What is left inside: each measure over the layers, or over another axis, with a line per model; means over seeds.",
        "interventions": "Forget (filled) and retain performance (open, pale) under interventions, over the first setting of each "
        f"grid; of the other settings, the one with the {worst} counts. Means over seeds.",
    }


def _text(measure: dict[str, Any]) -> str:
    return f", {measure['text']} text" if measure["text"] else ""


def _entries(report: Report) -> list[tuple[int, dict[str, Any]]]:
    return [(seed, entry) for model in report.models for seed, entry in model.entries.items()]


def _interventions(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The attacks on a model whose trials are points of a grid of numbers."""
    attacks = entry.get("attacks") or {}
    return {
        name: attack
        for name, attack in attacks.items()
        if attack["curves"] and isinstance(next(iter((attack["curves"][0].get("point") or {}).values()), None), (int, float))
    }


def _grid(model: ModelReport, name: str, higher: bool) -> dict[float, list[dict[str, float]]]:
    """For each value of the first grid setting, the worst point of each seed: its forget and retain performance."""
    found: dict[float, list[dict[str, float]]] = {}
    for entry in model.entries.values():
        of_seed: dict[float, dict[str, float]] = {}
        for curve in _interventions(entry).get(name, {"curves": ()})["curves"]:
            at = next(iter(curve["point"].values()))
            point = {part: curve[part][0]["value"] for part in ("forget", "retain")}
            other = of_seed.get(at)
            if other is None or (point["forget"] > other["forget"]) == higher:
                of_seed[at] = point
        for at, point in of_seed.items():
            found.setdefault(at, []).append(point)
    return found


def _number_cell(model: ModelReport, name: str) -> Cell:
    numbers = [own["number"] for e in model.entries.values() if (own := (e.get("measures") or {}).get(name))]
    known = [number for number in numbers if number is not None]
    if not known:
        return Cell("n/a") if numbers else Cell()
    spread = f"{min(known):.3g}–{max(known):.3g}" if len(known) > 1 else ""
    return Cell(f"{math.fsum(known) / len(known):.3g}", spread)


def _mean_curve(model: ModelReport, name: str) -> tuple[list[float], list[float]]:
    """Coordinates and means over seeds of a measure; points without a value are left out."""
    values: dict[float, list[float]] = {}
    for entry in model.entries.values():
        for point in ((entry.get("measures") or {}).get(name) or {"points": ()})["points"]:
            if point["value"] is not None:
                values.setdefault(point["at"], []).append(finite(point["value"]))
    return sorted(values), [math.fsum(values[at]) / len(values[at]) for at in sorted(values)]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure, panels = new_figure(3.7 * columns + 0.6, 2.7 * rows + 0.6, rows, columns)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _line(
    axes: Axes, xs: list[float], ys: list[float], model: ModelReport, colours: dict[str, Any], **style: Any
) -> list[Line2D]:
    marker = MARKERS[model.kind]
    return axes.plot(xs, ys, color=colours[model.name], marker=marker, markersize=4.5, linewidth=1.3, **style)


def _legend(figure: Figure, handles: list[Line2D], labels: list[str]) -> None:
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, max(1, len(labels))), fontsize=8.5)
