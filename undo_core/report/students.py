"""The figure of further students: one row per model, what the attack brings back and what was kept."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from undo_core.report.metrics import ModelReport, Report, Stat
from undo_core.report.style import COLOURS, colours_of, finite, new_figure, recovery, scale, unit_name

CONTROLS = ("unlearn", "undo", "random", "filter")


def students(report: Report) -> Figure | None:
    """Forget performance after the attack, and retain performance before it, of controls and further students.

    A row is a model; the grey line separates the controls of the same run from the students.
    """
    if not report.further:
        return None
    controls = [model for kind in CONTROLS for model in report.of(kind)]
    models = [*controls, *report.further]
    figure, panels = new_figure(8.6, 1.3 + 0.27 * len(models), columns=2, sharey=True)
    colours = colours_of(report)
    for axes, title in zip(panels, (f"forget, after {report.headline} attack steps", "retain, before the attack"), strict=True):
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_xlabel(unit_name(report))
        scale(axes.xaxis, axes, report)
        axes.axhline(len(controls) - 0.5, color="#bbbbbb", linewidth=0.9)
    for row, model in enumerate(models):
        before = model.metrics.get("forget", Stat())
        for axes, stat in zip(panels, (after(model, report), model.metrics.get("retain", Stat())), strict=True):
            if stat:
                low, high = stat.spread or (stat.mean, stat.mean)
                axes.plot([finite(low), finite(high)], [row, row], color=colours[model.name], linewidth=1.4)
                axes.plot(finite(stat.mean), row, marker="o", color=colours[model.name], markersize=6, linestyle="none")
        if before:
            panels[0].plot(finite(before.mean), row, "o", color=colours[model.name], markerfacecolor="white", markersize=4.5)
    panels[0].set_yticks(range(len(models)), [label(model) for model in models])
    panels[0].set_ylim(len(models) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=COLOURS["damaged"], marker="o", linewidth=1.4, label="mean and interval"),
        Line2D(
            [], [], color=COLOURS["damaged"], marker="o", markerfacecolor="white", linestyle="none", label="before the attack"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=8.5)
    return figure


def after(model: ModelReport, report: Report) -> Stat:
    """Worst-case forget performance after the headline number of steps."""
    return model.worst.get(report.headline, Stat())


def label(model: ModelReport) -> str:
    """Name of a row."""
    return model.label + recovery(model)


def captions(report: Report) -> dict[str, str]:
    """A caption for the figure."""
    interval = "smallest and largest seed" if len(report.seeds) > 1 else "95 % interval of the evaluation (one seed)"
    return {
        "students": "Worst-case forget performance after the attack (filled) and before it (open), and retain performance before the "
        f"attack. Bars: {interval}. Models drawn again after the distillation have lost retain performance by construction."
    }
