"""Searches in the report: the settings of the best trial on each model, and the best so far over the compute spent."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from undo_core.attacks.grid import harm
from undo_core.report.attacks import Point
from undo_core.report.metrics import Report, Stat
from undo_core.report.style import LINES, MARKERS, colours_of, finite, new_figure, scale, unit_name
from undo_core.report.table import Cell, Table, performance, rate


def searches_of(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The searches on a model, by name."""
    return {name: attack for name, attack in (entry.get("attacks") or {}).items() if attack.get("trials")}


def search_table(report: Report) -> Table:
    """Table of the best trial of each search on each model, one row per seed; no rows without a search."""
    headers = [
        ("model", ""),
        ("search", ""),
        ("forget", f"{report.unit}"),
        ("retain", f"{report.unit}"),
        ("best trial", ""),
        ("learning rate", ""),
        ("steps", "at the best, of all"),
        ("sequences", "a step"),
        ("optimizer", "warm-up"),
        ("trained", ""),
        ("retain text", "share"),
        ("spent", "FLOPs"),
    ]
    rows = []
    for model in report.models:
        for seed, entry in model.entries.items():
            for name, attack in searches_of(entry).items():
                trial = attack["trials"][attack["best"]]
                point, at = trial["point"], trial["best"]
                scores = [performance(Stat((_point(seed, trial[part][at]),)), report.higher) for part in ("forget", "retain")]
                trained = f"LoRA, rank {point['rank']}, × {point['scaling']:g}" if point["rank"] else "all weights"
                cells = [
                    Cell(model.label, f"seed {seed}" if len(report.seeds) > 1 else ""),
                    Cell(name),
                    *scores,
                    Cell(
                        f"{attack['best'] + 1} of {len(attack['trials'])}" if at else "none beats the model before the attack"
                    ),
                    Cell(rate(point["rate"])),
                    Cell(f"{trial['steps'][at]} of {trial['steps'][-1]}"),
                    Cell(str(point["batch_size"])),
                    Cell(point["optimizer"], f"{100 * point['warmup']:g} %"),
                    Cell(trained),
                    Cell(f"{100 * point['retain_share']:g} %"),
                    Cell(f"{attack['spent_flops']:.1e}"),
                ]
                rows.append(cells)
    return Table(headers, rows)


def search(report: Report) -> Figure | None:
    """Best forget performance that a search has found over the FLOPs that it has spent, one line per model and seed."""
    found = [
        (model, attack) for model in report.models for entry in model.entries.values() for attack in searches_of(entry).values()
    ]
    if not found:
        return None
    figure, (axes,) = new_figure(6.2, 4.1)
    colours, shown = colours_of(report), {}
    for model, attack in found:
        spent, best = best_so_far(attack["trials"], report.higher)
        style = {"color": colours[model.name], "linestyle": LINES[model.kind]}
        axes.plot(spent, [finite(value) for value in best], drawstyle="steps-post", linewidth=1.4, **style)
        scores = [trial["forget"][trial["best"]]["value"] for trial in attack["trials"]]
        axes.plot(
            spent[1:],
            [finite(value) for value in scores],
            marker=MARKERS[model.kind],
            color=colours[model.name],
            markersize=3.5,
            alpha=0.5,
            linestyle="none",
        )
        shown[model.name] = Line2D([], [], label=model.label, marker=MARKERS[model.kind], markersize=4.5, **style)
    axes.set_xlabel("FLOPs spent on the search")
    axes.set_ylabel(f"forget {unit_name(report)}")
    axes.set_xlim(left=0)
    scale(axes.yaxis, axes, report)
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=3, fontsize=8.5, columnspacing=1.2)
    return figure


def best_so_far(trials: list[dict[str, Any]], higher: bool) -> tuple[list[float], list[float]]:
    """FLOPs spent before the search and after each trial, and the best forget performance found by then."""
    spent, best = [0.0], [trials[0]["forget"][0]["value"]]
    for trial in trials:
        spent.append(spent[-1] + trial["flops"][-1])
        best.append(max(best[-1], trial["forget"][trial["best"]]["value"], key=lambda value: harm(value, higher)))
    return spent, best


def captions(report: Report) -> dict[str, str]:
    """A caption for each figure that this module draws."""
    return {
        "search": "Lines: the best forget performance that the search has found so far over the FLOPs of its trials. Points: the "
        "trials, each at its best evaluation that leaves the model useful. The search begins at the model before any attack."
    }


def _point(seed: int, score: dict[str, Any]) -> Point:
    return Point(seed, score["value"], score.get("low"), score.get("high"), score.get("n"))
