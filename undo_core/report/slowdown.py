"""Compute slowdown in the report: the table of levels and models, and the figure of forget performance over attack FLOPs."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from undo_core.attacks.slowdown import (
    Interval,
    Slowdown,
    comparable,
    frontier,
    levels_of,
    missing,
    other_text,
    reference_of,
    slowdowns,
    trajectories,
)
from undo_core.report.metrics import Report
from undo_core.report.seeds import FEWEST, TOO_FEW
from undo_core.report.style import (
    LINES,
    MARKERS,
    colours_of,
    finite,
    label_ends,
    legend_columns,
    new_figure,
    recovery,
    scale,
    unit_name,
)
from undo_core.report.table import Cell, Notes, Table, number

NEITHER = "{where}neither the model nor {reference} reaches the level within its budget"
AT_START = "reaches the level before any attack"


def slowdown_table(report: Report) -> Table:
    """Table of the compute slowdown, a row for each level and a column for each attacked model; medians over seeds.

    A footnote marks those of several seeds that are too few for an interval over seeds.
    It has no rows without an original and a model without the capability, or if no attack recorded its FLOPs.
    """
    notes, levels = Notes(), _levels(report)
    found = {result["seed"]: slowdowns(comparable(result), report.higher) for result in report.results}
    models = [model for model in report.models if any(model.name in own for own in found.values())]
    headers = [("capability back", "share; forget"), *((model.label, "× FLOPs") for model in models)]
    rows = []
    for share, values in levels.items():
        row = [Cell(f"{100 * share:g} %", f"{number(statistics.fmean(values), report.higher)} {report.unit}")]
        for model in models:
            seeds = [own[model.name][share] for own in found.values() if model.name in own]
            cell = slowdown_cell(seeds, notes, reference_label(report))
            if len(report.seeds) > 1 and len(seeds) < FEWEST:
                cell = dataclasses.replace(cell, marks=cell.marks + notes.mark(TOO_FEW))
            row.append(cell)
        rows.append(row)
    return Table(headers, rows, notes.texts)


def slowdown_cell(seeds: Sequence[Slowdown], notes: Notes, reference: str) -> Cell:
    """Cell with the median of the slowdown over seeds, the interval of the median, and the FLOPs.

    The median of values that lie in intervals lies between the medians of the intervals' ends. A ``≥`` or ``≤`` says that a model
    or the reference did not reach the level within its budget, so that only one end is known.
    """
    unknown = sum(one.unknown for one in seeds)
    amount = Interval(*(statistics.median(getattr(one.amount, end) for one in seeds) for end in ("low", "high")))
    spent = f"> {_flops(amount.low)} FLOPs" if amount.censored else f"{_flops(amount.high)} FLOPs"
    where = f"in {unknown} of {len(seeds)} seeds " if len(seeds) > 1 else ""
    marks = notes.mark(NEITHER.format(where=where, reference=reference)) if unknown else ""
    if all(one.amount.high == 0 for one in seeds):
        return Cell("0", marks=marks + notes.mark(AT_START))
    low, high = (statistics.median(getattr(one.ratio, end) for one in seeds) for end in ("low", "high"))
    span = f"{times(low)} to {times(high)}"
    if math.isinf(high):
        span = f"≥ {times(low)}" if low else "n/a"
    elif not low:
        span = f"≤ {times(high)}"
    values = [one.value for one in seeds if one.value is not None]
    if len(values) < len(seeds):
        return Cell(span, "", spent, marks)
    return Cell(times(statistics.median(values)), "" if low == high or span == "n/a" else span, spent, marks)


def slowdown(report: Report) -> Figure | None:
    """Best forget performance that any attack reaches against its FLOPs, one line per model and seed, and the levels.

    There is no figure unless some model was evaluated after two amounts of FLOPs.
    """
    tried = {model.name: [] for model in report.models}
    for entry in (entry for result in report.results for entry in comparable(result)):
        tried[entry["name"]].append(list(trajectories(entry)))
    found = {name: [line for each in seeds if (line := frontier(each, report.higher))[0]] for name, seeds in tried.items()}
    models = [model for model in report.models if found[model.name]]
    spent = [{amount for each in seed for amount in each.flops if amount} for model in models for seed in tried[model.name]]
    if max(map(len, spent), default=0) < 2:
        return None  # a single budget is a vertical line for each model
    right = max(amount for amounts in spent for amount in amounts)
    left = min(amount for model in models for flops, _ in found[model.name] for amount in [*flops, right] if amount) / 2
    figure, (axes,) = new_figure(6.2, 4.3)
    colours = colours_of(report)
    for model in models:
        for line in found[model.name]:
            flops, forget = [max(amount, left) for amount in line[0]], [finite(value) for value in line[1]]
            style = {"color": colours[model.name], "linestyle": LINES[model.kind], "drawstyle": "steps-post", "alpha": 0.9}
            axes.plot([*flops, right], [*forget, forget[-1]], linewidth=1.6 if len(found[model.name]) == 1 else 1.1, **style)
            axes.plot(
                flops[1:], forget[1:], marker=MARKERS[model.kind], color=colours[model.name], markersize=4.5, linestyle="none"
            )
    ends = []
    for share, values in _levels(report).items():
        ends.append((statistics.fmean(values), f"{100 * share:g} %", "#777777"))
        axes.axhline(ends[-1][0], color="#999999", linewidth=0.8, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xscale("log")
    axes.set_xlim(left, right * 1.05)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if right > 100 * left else (1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("+", "")))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("FLOPs of the attack (log; left edge: before it)")
    axes.set_ylabel(f"forget {unit_name(report)}")
    scale(axes.yaxis, axes, report)
    handles = [
        Line2D([], [], color=colours[m.name], linestyle=LINES[m.kind], marker=MARKERS[m.kind], label=m.label + recovery(m))
        for m in models
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(report), fontsize=8.5, columnspacing=1.2)
    label_ends(axes, ends)
    return figure


def captions(report: Report) -> dict[str, str]:
    """A caption for each figure that this module draws."""
    levels = (
        " Dashed: the levels of the table, as shares of the way from the reference to the original." if _levels(report) else ""
    )
    lines = "one line per model and seed" if len(report.seeds) > 1 else "one line per model"
    return {
        "slowdown": "Best forget performance that any attack and setting reaches with at most so many FLOPs, "
        f"{lines}{_without(report)}; a line is flat from its last improvement to the largest budget tried on any model.{levels}"
    }


def explanation(report: Report) -> str:
    """A paragraph below the table."""
    seeds = " Medians over seeds." if len(report.seeds) > 1 else ""
    apart = _without(report)
    left_out = f" All attacks that train on the forget text count{apart}." if apart else ""
    return (
        f"FLOPs after which the best attack first brings a model to a level, divided by those of {reference_label(report)}, "
        "which never had the capability: 1 means that starting from the model saves an attacker nothing. Levels are shares of the way "
        "from the reference, before any attack, to the original. Counted at the first evaluation that reaches the level; the "
        "interval below follows from the evaluations between which it lies. ≥: the model did not reach the level within its budget or, "
        "in an interval, the reference reached it by its first evaluation; "
        f"≤: the reference did not.{seeds}{left_out}"
    )


def missing_line(report: Report) -> str:
    """Says in a line why attacked models have no table of the slowdown; empty if they have one, or if none was attacked."""
    if not any(model.attacks for model in report.models) or slowdown_table(report).rows:
        return ""
    return f"No compute slowdown: {missing(comparable(report.results[0]), report.higher)}{_without(report)}."


def reference_label(report: Report) -> str:
    """Display name of the model that the others are compared with."""
    entry = reference_of(comparable(report.results[0]))
    return next((model.label for model in report.models if entry is not None and model.name == entry["name"]), "the reference")


def times(value: float) -> str:
    """Formats a ratio with two significant digits, or as a whole number from 10 on."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _levels(report: Report) -> dict[float, list[float]]:
    """The forget performance at each share, of each seed that has the level."""
    found: dict[float, list[float]] = {}
    for result in report.results:
        for share, level in levels_of(comparable(result), report.higher).items():
            found.setdefault(share, []).append(level)
    return found


def _without(report: Report) -> str:
    """Names the attacks on other text, which do not count; empty if there are none."""
    names = other_text(report.results[0].get("config") or {})
    return f"; left out, because they train on other text: {', '.join(names)}" if names else ""


def _flops(value: float) -> str:
    return f"{value:.1e}"
