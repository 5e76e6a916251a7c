"""Every plotted value of the comparison report, with the run folder and the stage that it comes from."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from undo_core.report.attacks import Point, drawn
from undo_core.report.claims import labelled_tokens
from undo_core.report.metrics import STUDENTS, ModelReport, Report
from undo_core.report.table import csv_cell
from undo_core.report.words import method_name

FIGURES = ("overview", "oracle", "methods", "envelopes", "robustness", "labels")
COMPARED = ("unlearn", "undo", "filter")  # a method before and after UNDO, and the gold standard


@dataclass(frozen=True)
class Setting:
    """One method of the comparison: runs that differ only in their seed and in their list of alphas.

    Attributes:
        label: display name.
        report: quantities derived from the results.
        origins: run folder of each ``(model name, seed)``.
        runs: the run folders.
        lender: label of the setting whose data filtering is used here, if this setting trained none.
    """

    label: str
    report: Report
    origins: dict[tuple[str, int], str]
    runs: list[str]
    lender: str | None = None

    def compared(self, *kinds: str) -> Iterator[ModelReport]:
        """Yields the models of these kinds; for UNDO only the strongest."""
        for kind in kinds:
            models = self.report.of(kind) if kind != "undo" else [self.report.strongest] if self.report.strongest else []
            yield from models


@dataclass(frozen=True)
class PlotPoint:
    """Value of one seed in a figure.

    Attributes:
        figure: name of the figure.
        panel: panel of the figure.
        series: name of the line, bar or marker.
        x, y: coordinates; x is a name on an axis of names. A y of at least 1e30 stands for a model that diverged.
        seed: seed of the run.
        run: folder of the run.
        stage: folder of the evaluated model, under ``stages`` of the run or of its sweep; for a ratio (R, C) the model's own.
    """

    figure: str
    panel: str
    series: str
    x: float | str
    y: float
    seed: int
    run: str
    stage: str


def plot_points(settings: Sequence[Setting]) -> list[PlotPoint]:
    """Returns the points of every figure."""
    makers = (_overview, _oracle, _methods, _envelopes, _robustness, _labels)
    return [point for make in makers for point in make(settings)]


def csv_text(points: Sequence[PlotPoint]) -> str:
    """Formats the points as CSV with a header."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(PlotPoint)])
    writer.writerows(map(csv_cell, dataclasses.astuple(point)) for point in points)
    return out.getvalue()


def _overview(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """Retain and forget performance before and after the attack, by method."""
    for setting in settings:
        for model in setting.compared("original", *COMPARED):
            for panel in ("retain", "forget"):
                before, after = _before(model, panel), _after(setting, model, panel)
                yield from _at("overview", panel, f"{model.kind}, before", setting, model, setting.label, before)
                yield from _at("overview", panel, f"{model.kind}, after", setting, model, setting.label, after)


def _methods(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """Forget against retain performance, before and after the attack."""
    for setting in settings:
        for model in setting.compared(*COMPARED):
            series = f"{setting.label}, {model.kind}"
            for panel, pairs in (
                ("before", (_before(model, "retain"), _before(model, "forget"))),
                ("after", (_after(setting, model, "retain"), _after(setting, model, "forget"))),
            ):
                yield from _pairs("methods", panel, series, setting, model, *pairs)


def _oracle(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """Worst-case relearning curves of oracle matching and its controls, for settings with oracle matching."""
    for setting in settings:
        if setting.report.of("oracle") or setting.report.of("oracle-random"):
            yield from _curves("oracle", setting, ("unlearn", "oracle", "oracle-random", "filter"))


def _envelopes(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """Relearning curves: at every step the worst case over attacks and rates, and the weakest attack."""
    for setting in settings:
        yield from _curves("envelopes", setting, ("unlearn", "undo", "damaged", "gated", "random", "filter"))


def _robustness(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """R against C, by alpha."""
    for setting in settings:
        for model in (m for m in setting.report.models if m.kind in STUDENTS):
            series = f"{setting.label}, {model.name}"
            for unit in ("steps", "flops"):
                spent = {point.seed: point for point in model.compute[unit].points}
                pairs = [(spent[p.seed], p) for p in model.robustness.points if p.seed in spent]
                yield from _pairs("robustness", unit, series, setting, model, *zip(*pairs, strict=True) if pairs else ((), ()))


def _labels(settings: Sequence[Setting]) -> Iterator[PlotPoint]:
    """Robustness over the label budget, for methods that were run with several budgets.

    The budgets of seeds differ slightly because rows differ in length, so their mean is plotted.
    """
    budgets: dict[tuple[str, int], set[int]] = {}
    for setting in settings:
        for seed, tokens in _labelled(setting).items():
            budgets.setdefault((_method(setting), seed), set()).add(tokens)
    swept = {method for (method, _), tokens in budgets.items() if len(tokens) > 1}
    for setting in settings:
        labelled = _labelled(setting)
        if _method(setting) not in swept or not labelled:
            continue
        budget = round(sum(labelled.values()) / len(labelled))
        for model in setting.compared(*COMPARED):
            for panel, points in (("forget", _after(setting, model, "forget")), ("R", model.robustness.points)):
                yield from _at("labels", panel, f"{_method(setting)}, {model.kind}", setting, model, budget, points)


def _method(setting: Setting) -> str:
    unlearn = (setting.report.results[0].get("config") or {}).get("unlearn") or {}
    parts = [unlearn.get("method") or setting.label, unlearn.get("robust") or "none"]
    return method_name("+".join(part for part in parts if part != "none"))


def _labelled(setting: Setting) -> dict[int, int]:
    """Number of labelled forget tokens of the unlearning, by seed."""
    entries = [item for model in setting.report.of("unlearn") for item in model.entries.items()]
    labelled = {seed: labelled_tokens(entry).get("forget") for seed, entry in entries}
    return {seed: tokens for seed, tokens in labelled.items() if tokens}


def _before(model: ModelReport, key: str) -> Sequence[Point]:
    return model.metrics[key].points if key in model.metrics else ()


def _after(setting: Setting, model: ModelReport, key: str) -> Sequence[Point]:
    """Forget or retain performance under the attack that is worst for the forget set at the headline step."""
    worst = model.worst.get(setting.report.headline)
    points = worst.points if worst else ()
    if key == "forget":
        return points
    return [dataclasses.replace(point, value=point.retain) for point in points if point.retain is not None]


def _curves(figure: str, setting: Setting, kinds: Sequence[str]) -> Iterator[PlotPoint]:
    for model in setting.compared(*kinds):
        for step, stat in model.drawn.items():
            yield from _at(figure, setting.label, model.kind, setting, model, step, stat.points)
        for seed, entry in model.entries.items():
            for step, point in drawn(entry, seed, setting.report.higher, least=True).items():
                yield from _at(figure, setting.label, f"{model.kind}, weakest", setting, model, step, [point])


def _at(
    figure: str, panel: str, series: str, setting: Setting, model: ModelReport, x: float | str, points: Sequence[Point]
) -> Iterator[PlotPoint]:
    for point in points:
        run = setting.origins[model.name, point.seed]
        yield PlotPoint(figure, panel, series, x, point.value, point.seed, run, _stage(model, point))


def _pairs(
    figure: str, panel: str, series: str, setting: Setting, model: ModelReport, xs: Sequence[Point], ys: Sequence[Point]
) -> Iterator[PlotPoint]:
    """Yields points of seeds that have both coordinates."""
    across = {point.seed: point.value for point in xs}
    for point in ys:
        if point.seed in across:
            yield from _at(figure, panel, series, setting, model, across[point.seed], [point])


def _stage(model: ModelReport, point: Point) -> str:
    """Folder of the evaluated model; for R and C, which combine several models, the model's own."""
    return point.stage or model.entries[point.seed].get("stage") or ""
