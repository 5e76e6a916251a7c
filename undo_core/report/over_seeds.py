"""Tables and sentences over the seeds of a study: medians, paired differences, and the orders that they support."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from undo_core.report.metrics import STUDENTS, ModelReport, Report, Stat
from undo_core.report.points import Setting
from undo_core.report.seeds import FEWEST, TOO_FEW, Difference, bootstrap, corrected, paired
from undo_core.report.table import Cell, Notes, Table, number, ratio

ABOUT = (
    "Medians over seeds; in parentheses the 95 % bootstrap interval over seeds, which for up to five seeds is their range. "
    "Differences are taken seed by seed. p is that of a paired t-test after Holm's correction for all tests of its column. An order "
    "is claimed only if p < 0.05 and the interval of the difference does not contain 0."
)


@dataclass(frozen=True)
class Comparison:
    """A model beside the one that it is compared with, of one report or of two.

    Attributes:
        names: display names of the two.
        where: what both have in common, or why they cannot be compared; empty if the names say it.
        one, other: the models; differences are ``one - other``. None if the methods have no students that can be compared.
    """

    names: tuple[str, str]
    where: str
    one: ModelReport | None
    other: ModelReport | None


@dataclass(frozen=True)
class Quantity:
    """A quantity that models are compared in.

    Attributes:
        name, unit: heading of its column.
        of: its values over the seeds.
        shown: formats a difference.
        more, less: verbs for a positive and a negative difference.
    """

    name: str
    unit: str
    of: Callable[[ModelReport], Stat]
    shown: Callable[[float], str]
    more: str
    less: str


def quantities(report: Report) -> list[Quantity]:
    """Attacked forget performance, R, and C in FLOPs."""
    after = lambda model: model.worst.get(report.headline, Stat())  # noqa: E731
    easier, harder = "relearns more than", "relearns less than"
    return [
        Quantity(
            f"forget after {report.headline} steps",
            "points" if report.higher else report.unit,
            after,
            lambda value: _signed(number(value, report.higher)),
            *((easier, harder) if report.higher else (harder, easier)),
        ),
        Quantity(
            "R", "", lambda m: m.robustness, lambda value: _signed(ratio(value)), "has a larger R than", "has a smaller R than"
        ),
        Quantity(
            "C",
            "FLOPs",
            lambda m: m.compute.get("flops", Stat()),
            lambda v: _signed(ratio(v)),
            "costs more than",
            "costs less than",
        ),
    ]


def compared(settings: Sequence[Setting]) -> list[Comparison]:
    """The comparisons of a page: between methods or, if there is only one, between its neighbouring alphas."""
    return between_methods(settings) if len(settings) > 1 else between_alphas(settings[0].report)


def between_methods(settings: Sequence[Setting]) -> list[Comparison]:
    """Each method's UNDO student beside that of the reference, at the strongest alpha that both have.

    The reference is the method whose data filtering others use, or the first. The strongest alpha is the largest at which neither
    student is censored, or the largest if there is none. Methods without an alpha or a seed in common have a comparison that says so.
    """
    lenders = {setting.lender for setting in settings}
    reference = next((setting for setting in settings if setting.label in lenders), settings[0])
    return [_against(reference, setting) for setting in settings if setting is not reference]


def _against(reference: Setting, setting: Setting) -> Comparison:
    names = (setting.label, reference.label)
    theirs = {model.name: model for model in reference.report.of("undo")}
    pairs = [(model, theirs[model.name]) for model in setting.report.of("undo") if model.name in theirs]
    if not pairs:
        return Comparison(names, f"not compared: no alpha in common ({_alphas(setting)}; {_alphas(reference)})", None, None)
    one, other = next((pair for pair in reversed(pairs) if not any(model.censored for model in pair)), pairs[-1])
    if not one.entries.keys() & other.entries.keys():
        return Comparison(names, f"not compared: no seed in common at {one.label}", None, None)
    return Comparison(names, one.label, one, other)


def _alphas(setting: Setting) -> str:
    return " and ".join(f"{model.alpha:g}" for model in setting.report.of("undo")) or "none"


def between_alphas(report: Report) -> list[Comparison]:
    """Each UNDO student beside the one with the next smaller alpha, and the largest alpha beside the smallest."""
    students = report.of("undo")
    pairs = list(itertools.pairwise(students))
    if len(students) > 2:
        pairs.append((students[0], students[-1]))
    return [Comparison((larger.label, smaller.label), "", larger, smaller) for smaller, larger in pairs]


def medians_table(settings: Sequence[Setting]) -> Table:
    """Medians of every student, of unlearning alone and of data filtering.

    It has no rows if no model has :data:`FEWEST` seeds. Footnotes mark medians of fewer, and those that lack a seed.
    """
    report, notes = settings[0].report, Notes()
    headers = [
        ("method", ""),
        ("model", ""),
        ("seeds", ""),
        ("retain", report.unit),
        (f"after {report.headline} steps", f"forget, {report.unit}"),
    ]
    headers += [("R", "robustness"), ("C", "steps"), ("C", "FLOPs")]
    rows = []
    for setting in settings:
        for model in setting.report.models:
            if model.kind not in ("unlearn", *STUDENTS, "filter") or (model.kind == "filter" and setting.lender):
                continue
            performances = (model.metrics.get("retain", Stat()), model.worst.get(report.headline, Stat()))
            ratios = (model.robustness, model.compute.get("steps", Stat()), model.compute.get("flops", Stat()))
            row = [Cell(setting.label), Cell(model.label), Cell(str(len(model.entries)))]
            row += [median_cell(stat, lambda value: number(value, report.higher), notes) for stat in performances]
            rows.append(row + [median_cell(stat, ratio, notes) for stat in ratios])
    enough = max(len(setting.report.seeds) for setting in settings) >= FEWEST
    return Table(headers, rows, notes.texts) if enough else Table(headers, [])


def median_cell(stat: Stat, shown: Callable[[float], str], notes: Notes) -> Cell:
    """Cell with the median over the seeds and its bootstrap interval; footnotes say which seeds lack a value, or if they are too few."""
    if not stat:
        return Cell()
    values = [point.value for point in stat.points]
    interval, middle = bootstrap(values), shown(statistics.median(values))
    some = f"median over {len(values)} of {len(values) + len(stat.missing)} seeds; in the others"
    marks = "".join(notes.mark(f"{some}: {reason}") for reason in dict.fromkeys(stat.missing.values()))
    if interval is None:
        return Cell(middle, marks=marks + notes.mark(TOO_FEW))
    return Cell(middle, f"{shown(interval[0])}–{shown(interval[1])}", marks=marks)


def differences_table(report: Report, comparisons: Sequence[Comparison]) -> Table:
    """Paired differences of the comparisons; ``report`` gives metric and headline.

    It has no rows if neither the report nor a compared model has :data:`FEWEST` seeds. Footnotes mark differences over fewer, and
    those over fewer than the row's others.
    """
    headers, columns, notes = [("difference", ""), ("seeds", "")], [], Notes()
    for quantity in quantities(report):
        headers += [(quantity.name, quantity.unit), ("p", "Holm")]
        columns.append((quantity, _differences(quantity, comparisons)))
    rows = []
    for index, comparison in enumerate(comparisons):
        seeds = max(len(found[index].seeds) if found[index] else 0 for _, found in columns)
        name = ", ".join(filter(None, [" – ".join(comparison.names), comparison.where]))
        row = [Cell(name), Cell(str(seeds))]
        for quantity, found in columns:
            row += _cells(quantity, found[index], seeds, notes)
        rows.append(row)
    return Table(headers, rows, notes.texts) if _enough(report, comparisons) else Table(headers, [])


def order_sentences(report: Report, comparisons: Sequence[Comparison]) -> list[str]:
    """Says for each quantity between which models the seeds show an order, and between how many they do not."""
    if not comparisons or not _enough(report, comparisons):
        return []
    sentences = []
    for quantity in quantities(report):
        found = _differences(quantity, comparisons)
        tested = [(c, d) for c, d in zip(comparisons, found, strict=True) if d is not None and d.corrected is not None]
        if not tested:
            continue
        shown = [
            f"{comparison.names[0]} {quantity.more if difference.median > 0 else quantity.less} {comparison.names[1]}"
            for comparison, difference in tested
            if difference.ordered
        ]
        left = len(tested) - len(shown)
        rest = f"no order in {left} of {len(tested)} comparisons" if left else ""
        name = f"{quantity.name} ({quantity.unit})" if quantity.unit else quantity.name
        sentences.append(f"{name}: {'; '.join([*shown, *([rest] if rest else [])])}.")
    return sentences


def _differences(quantity: Quantity, comparisons: Sequence[Comparison]) -> list[Difference | None]:
    points = [[quantity.of(model).points if model else () for model in (c.one, c.other)] for c in comparisons]
    return corrected([paired(*both) for both in points])


def _cells(quantity: Quantity, found: Difference | None, seeds: int, notes: Notes) -> list[Cell]:
    if found is None:
        return [Cell(), Cell()]
    alone = f"over seed{'s' if len(found.seeds) > 1 else ''} {', '.join(map(str, found.seeds))} alone"
    marks = notes.mark(alone) if len(found.seeds) < seeds else ""
    if found.interval is None:
        return [Cell(quantity.shown(found.median), marks=marks + notes.mark(TOO_FEW)), Cell()]
    spread = " to ".join(map(quantity.shown, found.interval))
    p = Cell() if found.corrected is None else Cell(_p(found.corrected), remark="an order" if found.ordered else "")
    return [Cell(quantity.shown(found.median), spread, marks=marks), p]


def _p(value: float) -> str:
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"


def _enough(report: Report, comparisons: Sequence[Comparison]) -> bool:
    models = [model for c in comparisons for model in (c.one, c.other) if model is not None]
    return max([len(report.seeds), *(len(model.entries) for model in models)]) >= FEWEST


def _signed(text: str) -> str:
    return text if text.startswith("-") or not text.strip("0.") else f"+{text}"
