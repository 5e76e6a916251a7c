"""Figures of the report. Each drawing function returns None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from undo_core.report.attacks import envelope
from undo_core.report.inside import inside, interventions
from undo_core.report.metrics import LABELS, STUDENTS, ModelReport, Report, Stat
from undo_core.report.search import search
from undo_core.report.slowdown import slowdown
from undo_core.report.students import students
from undo_core.report.style import (
    COLOURS,
    LINES,
    MARKERS,
    STYLE,
    colours_of,
    finite,
    label_ends,
    legend_columns,
    new_figure,
    png,
    recovery,
    scale,
    step_panels,
    unit_name,
)
from undo_core.report.table import rate


def draw(report: Report) -> dict[str, bytes]:
    """Draws every figure that the results allow; returns ``{name: PNG}`` in the order of the page."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for function in (relearning, slowdown, compute, tradeoff, training, rates, search, students, interventions, inside):
            figure = function(report)
            if figure is not None:
                drawn[function.__name__] = png(figure)
    return drawn


def relearning(report: Report) -> Figure | None:
    """Worst-case forget performance against attack step, one line per model."""
    models = [model for model in report.main if model.drawn]
    if not models:
        return None
    figure, (axes,) = new_figure(6.2, 4.3)
    colours, ends = colours_of(report), []
    for model in models:
        steps = list(model.drawn)
        means = [finite(model.drawn[step].mean) for step in steps]
        spreads = [model.drawn[step].spread or (model.drawn[step].mean,) * 2 for step in steps]
        low, high = ([finite(pair[side]) for pair in spreads] for side in (0, 1))
        colour = colours[model.name]
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(
            steps, means, color=colour, linestyle=LINES[model.kind], marker=MARKERS[model.kind], markersize=4.5, clip_on=False
        )
        ends.append((means[-1], model.label + recovery(model), colour))
    original = next((m.metrics["forget"] for m in report.of("original") if m.metrics.get("forget")), None)
    if original:
        axes.axhline(original.mean, color=COLOURS["original"], linewidth=1.2, linestyle=(0, (2, 2)), zorder=1)
        ends.append((original.mean, "original, not attacked", COLOURS["original"]))
    axes.axvline(report.headline, color="#bbbbbb", linewidth=0.9, zorder=1)
    axes.set_xlabel("attack step (fine-tuning on the forget set)")
    axes.set_ylabel(f"worst-case forget {unit_name(report)}")
    scale(axes.yaxis, axes, report)
    axes.set_xlim(0, max(step for model in models for step in model.drawn) or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.text(
        report.headline,
        1.01,
        f"headline: {report.headline} steps",
        transform=axes.get_xaxis_transform(),
        ha="center",
        fontsize=8.5,
        color="#777777",
    )
    label_ends(axes, ends)
    return figure


def compute(report: Report) -> Figure | None:
    """R against C in steps and in FLOPs, with a point per alpha, and unlearn only and data filtering for comparison."""
    students = [m for m in report.main if m.kind in STUDENTS and m.robustness]
    panels = [unit for unit in ("steps", "flops") if any(_pairs(m, unit) for m in students)]
    if not panels:
        return None
    figure, axes_row = new_figure(3.4 * len(panels) + 0.8 * (len(panels) == 1), 4.0, columns=len(panels), sharey=True)
    colours, halo = colours_of(report), [withStroke(linewidth=3, foreground="white")]
    for axes, unit in zip(axes_row, panels, strict=True):
        axes.axline((0, 0), (1, 1), color="#bbbbbb", linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        axes.plot(1, 1, marker=MARKERS["filter"], color=COLOURS["filter"], markersize=9, linestyle="none", zorder=3)
        axes.plot(
            _unlearning_share(report, unit),
            0,
            marker=MARKERS["unlearn"],
            color=COLOURS["unlearn"],
            markersize=8,
            linestyle="none",
            zorder=3,
        )
        means = []
        for model in students:
            pairs = _pairs(model, unit)
            if not pairs:
                continue
            xs, ys = [p[0] for p in pairs], [p[1] for p in pairs]
            x, y = sum(xs) / len(xs), sum(ys) / len(ys)
            colour, marker = colours[model.name], MARKERS[model.kind]
            if len(pairs) > 1:
                axes.plot(xs, ys, marker=marker, color=colour, markersize=3.5, alpha=0.45, linestyle="none", zorder=2)
                axes.plot([min(xs), max(xs)], [y, y], color=colour, linewidth=1.1, zorder=2)
                axes.plot([x, x], [min(ys), max(ys)], color=colour, linewidth=1.1, zorder=2)
            axes.plot(x, y, marker=marker, color=colour, markersize=8, linestyle="none", zorder=4)
            means.append((x, y, f"{model.alpha:g}" if model.kind == "undo" else "", colour))
        line = [(x, y) for x, y, text, _ in means if text]
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color="#4a7ab5", linewidth=1, alpha=0.6, zorder=2)
        for x, y, text, colour in means:
            axes.annotate(
                text,
                (x, y),
                (-7, 5),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=colour,
                path_effects=halo,
                zorder=5,
            )
        right = max([1.0, *(x for x, *_ in means)])
        axes.set_xlim(-0.06 * right, right * 1.1)
        ys = [y for _, y, *_ in means]
        axes.set_ylim(min(-0.06, min(ys) - 0.08), max(1.1, max(ys) + 0.1))
        axes.set_xlabel(f"C, {'FLOPs' if unit == 'flops' else 'training steps'} / data filtering's")
    axes_row[0].set_ylabel("R, robustness to relearning")
    kinds = ["unlearn", *dict.fromkeys(m.kind for m in students), "filter"]
    dark = colours[report.of("undo")[-1].name] if report.of("undo") else "#08306b"
    names = {"undo": "UNDO (number: α)", "unlearn": "unlearn only", "filter": "data filtering", "random": "random student"}
    names |= {"gated": LABELS["gated"], "damaged": "other damage"}
    handles = [
        Line2D([], [], color=COLOURS.get(kind, dark), marker=MARKERS[kind], linestyle="none", markersize=7, label=names[kind])
        for kind in kinds
    ]
    handles.append(Line2D([], [], color="#bbbbbb", linestyle=(0, (3, 3)), linewidth=1, label="R = C"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 3 if len(panels) > 1 else 2), fontsize=9)
    return figure


def tradeoff(report: Report) -> Figure | None:
    """Retain against forget performance, before the attack and after its headline number of steps."""
    drawn = [m for m in report.main if m.metrics.get("retain") and m.metrics.get("forget")]
    if not drawn:
        return None
    figure, (axes,) = new_figure(6.2, 4.6)
    colours, handles = colours_of(report), []
    for model in drawn:
        colour, marker = colours[model.name], MARKERS[model.kind]
        x, y = (finite(model.metrics[key].mean) for key in ("retain", "forget"))
        after = _after(model, report)
        axes.plot(
            x,
            y,
            marker=marker,
            color=colour,
            markersize=8,
            markerfacecolor="white",
            markeredgewidth=1.7,
            linestyle="none",
            zorder=4,
        )
        if after:
            arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.3, "shrinkA": 5, "shrinkB": 5, "alpha": 0.75}
            axes.annotate("", after, (x, y), arrowprops=arrow, zorder=3)
            axes.plot(*after, marker=marker, color=colour, markersize=8, linestyle="none", zorder=4)
        handles.append(
            Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=7, label=model.label + recovery(model))
        )
    axes.set_xlabel(f"retain {unit_name(report)}")
    axes.set_ylabel(f"forget {unit_name(report)}")
    scale(axes.yaxis, axes, report)
    scale(axes.xaxis, axes, report)
    if any(_after(m, report) for m in drawn):
        handles.append(
            Line2D(
                [], [], color="#555555", marker="o", markerfacecolor="white", linestyle="none", label="open: before the attack"
            )
        )
        text = f"filled: after {report.headline} attack steps"
        handles.append(Line2D([], [], color="#555555", marker="o", linestyle="none", label=text))
    if report.higher:
        lowest = min(min(line.get_xdata()) for line in axes.lines)
        axes.set_xlim(max(-0.025, lowest - 0.08), 1.025)
    corner = "better: lower right ↘" if report.higher else "better: upper left ↖"
    axes.set_title(corner, loc="right" if report.higher else "left", fontsize=9, color="#777777")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(report, 3 if len(handles) > 6 else 2),
        fontsize=8.5,
        columnspacing=1.2,
    )
    return figure


def training(report: Report) -> Figure | None:
    """Retain performance against training step, with the retain target."""
    curves: dict[str, list[tuple[list[int], list[float], bool | None]]] = {}
    for model in report.main:
        for seed, run in model.trainings.items():
            points = [(p["step"], finite(p["retain"])) for p in run.get("history") or [] if p.get("retain") is not None]
            if points and model.kind not in ("original", "unlearn"):
                reached = None if seed not in report.targets or model.kind.startswith("oracle") else seed not in model.censored
                curves.setdefault(model.name, []).append(([p[0] for p in points], [p[1] for p in points], reached))
    if not curves:
        return None
    figure, (axes,) = new_figure(6.2, 4.1)
    colours, handles, right = colours_of(report), [], 0
    for model in report.main:
        runs = curves.get(model.name, [])
        colour = colours[model.name]
        for steps, values, reached in runs:
            axes.plot(
                steps, values, color=colour, linestyle=LINES[model.kind], linewidth=1.6 if len(runs) == 1 else 1.1, alpha=0.9
            )
            if reached is not None:
                end = {"marker": "o" if reached else "X", "markersize": 6.5 if reached else 8}
                axes.plot(steps[-1], values[-1], color=colour, linestyle="none", markeredgecolor="white", zorder=4, **end)
            right = max(right, steps[-1])
        if runs:
            label = model.label + recovery(model)
            handles.append(Line2D([], [], color=colour, linestyle=LINES[model.kind], label=label))
    for index, target in enumerate(report.targets.values()):
        axes.axhline(target, color="#444444", linewidth=1, linestyle=(0, (3, 2)), zorder=1)
        if index == 0:
            place = {
                "xy": (0.012, target),
                "xytext": (0, 3 if report.higher else -3),
                "va": "bottom" if report.higher else "top",
            }
            axes.annotate("retain target", xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=9, **place)
    axes.set_xlabel("training step")
    axes.set_ylabel(f"retain {unit_name(report)}, validation")
    axes.margins(y=0.12)  # room for the name of the target between its line and the axis
    scale(axes.yaxis, axes, report)
    axes.set_xlim(0, right * 1.02 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ended = {seed not in model.censored for model in report.main if model.name in curves for seed in model.trainings}
    if report.targets:
        ends = {True: ("o", "target reached"), False: ("X", "step limit reached first")}
        handles += [
            Line2D([], [], color="#555555", marker=m, linestyle="none", label=t) for k, (m, t) in ends.items() if k in ended
        ]
    figure.legend(handles=handles, loc="outside lower center", ncols=legend_columns(report), fontsize=8.5, columnspacing=1.2)
    return figure


def rates(report: Report) -> Figure | None:
    """Forget performance against attack step at every learning rate, with one panel per model.

    There is no figure if every attack has a single curve, which the relearning figure shows already.
    """
    models = [model for model in report.main if model.attacks]
    if all(len(attack["curves"]) == 1 for model in models for attack in model.attacks.values()):
        return None
    grid = report.rates
    shades = {r: colormaps["cividis"](0.93 * i / max(1, len(grid) - 1)) for i, r in enumerate(grid)}
    columns = 2 if len(models) in (2, 4) else min(3, len(models))
    rows = -(-len(models) // columns)
    figure, panels = new_figure(2.25 * columns + 0.4, 1.95 * rows + 0.9, rows, columns, sharex=True, sharey=True)
    for axes, model in zip(panels, models, strict=False):
        for seed, attack in model.attacks.items():
            worst = envelope({"attack": attack}, seed, report.higher, report.headline)
            axes.plot(
                list(worst), [finite(p.value) for p in worst.values()], color="#f2b8a0", linewidth=5, alpha=0.75, zorder=1
            )
            for curve in attack["curves"]:
                values = [finite(score["value"]) for score in curve["forget"]]
                axes.plot(attack["steps"][: len(values)], values, color=shades[curve["rate"]], linewidth=1.2)
        axes.set_title(model.label + recovery(model), fontsize=9.5)
    step_panels(figure, panels, len(models), columns, report.steps[-1], report)
    handles = [Line2D([], [], color=shades[r], linewidth=1.6, label=rate(r)) for r in grid]
    handles.append(Line2D([], [], color="#f2b8a0", linewidth=5, label="worst case"))
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=min(len(handles), 2 * columns),
        fontsize=8.5,
        title="learning rate",
    )
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pairs(model: ModelReport, unit: str) -> list[tuple[float, float]]:
    """Pairs ``(C, R)`` of the seeds that have both."""
    c: dict[int, float] = {p.seed: p.value for p in model.compute[unit].points}
    return [(c[p.seed], p.value) for p in model.robustness.points if p.seed in c]


def _unlearning_share(report: Report, unit: str) -> float:
    """Ratio of the steps or FLOPs of unlearning to those of data filtering, as a mean over seeds."""
    # Its steps are recorded with the students, in steps of as many tokens as theirs.
    kind, key = ("undo", "unlearning_steps") if unit == "steps" else ("unlearn", "flops")
    shares = []
    for model, control in ((m, f) for m in report.of(kind) for f in report.of("filter")):
        for seed, run in model.trainings.items():
            base = control.trainings.get(seed, {}).get(f"stop_{'step' if unit == 'steps' else unit}")
            if base and key in run:
                shares.append(run[key] / base)
    return sum(shares) / len(shares) if shares else 0.0


def _after(model: ModelReport, report: Report) -> tuple[float, float] | None:
    """Retain and worst-case forget performance after the headline number of steps; None unless both are finite."""
    points = [p for p in model.worst.get(report.headline, Stat()).points if p.retain is not None]
    if not points:
        return None
    pair = finite(_mean([p.retain for p in points])), finite(_mean([p.value for p in points]))
    return None if any(v != v for v in pair) else pair
