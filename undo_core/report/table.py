"""Tables of the report as cells, and their rendering as Markdown and for the terminal; ``page`` renders them as HTML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from undo_core.report.attacks import Point, worst_by_attack
from undo_core.report.metrics import KEPT, ModelReport, Order, Report, Stat
from undo_core.report.robustness import DIVERGED

NONE = "–"
NEEDS_ORIGINAL = "needs the original model, and does not enter the worst case"
MAX_STEPS = 4  # columns of attack steps; the figures show all steps
SCOPE = (
    "Every column of a student of the unlearned model counts the unlearning, the pass of a cached teacher and its own training; peak "
    "memory is the largest of them. Other rows count their own training alone. Tokens are those trained on."
)
NO_CHAIN = "A dash: results of an older version have the steps, time and memory of a student's own training alone."
FEW = 30  # sequences below which the interval of an evaluation is rough


@dataclass(frozen=True)
class Cell:
    """Cell of a table: the formatted value, its range, a remark such as its learning rates, and footnote marks."""

    main: str = NONE
    spread: str = ""
    remark: str = ""
    marks: str = ""

    @property
    def noted(self) -> str:
        """The footnote marks as text, such as [a,b]; empty without marks."""
        return f"[{','.join(sorted(self.marks))}]" if self.marks else ""

    @property
    def small(self) -> str:
        """Text in small print next to the value: range and remark."""
        return ", ".join(part for part in (self.spread, self.remark) if part)


@dataclass(frozen=True)
class Table:
    """Table: headers as ``(name, unit)``, rows of cells, footnotes ``{mark: text}``, and sentences below it."""

    headers: list[tuple[str, str]]
    rows: list[list[Cell]]
    notes: dict[str, str] = field(default_factory=dict)
    below: list[str] = field(default_factory=list)


def results_table(report: Report) -> Table:
    """Table of performance before and after the attack, R and C, with one row per model."""
    notes = Notes()
    unit = report.unit
    steps = _columns(report)
    held_out = [k for k in ("heldout_retain", "heldout_forget") if any(m.metrics.get(k) for m in report.models)]
    ratios, left_out = ratio_columns(report.models)
    attacked = any(retain_after(m, report) for m in report.models)
    bounded = any(m.bounded for m in report.models)
    headers = [("model", ""), ("retain", unit), ("forget", unit)]
    for step in steps:
        headers.append((_after(step), f"worst case, {unit}"))
        if attacked and step == report.headline:
            headers.append((f"retain after {step} steps", f"of that trial, {unit}"))
    headers += [("forget, still useful", f"worst case, {unit}; {margin(report)}")] if bounded else []
    headers += ratios
    headers += [(key.replace("heldout_", "held-out "), unit) for key in held_out]
    rows = []
    for model in report.models:
        row = [Cell(model.label, marks=model_marks(model, report, notes))]
        row += [performance(model.metrics.get(key, Stat()), report.higher) for key in ("retain", "forget")]
        for step in steps:
            row.append(performance(model.worst.get(step, Stat()), report.higher))
            if attacked and step == report.headline:
                row.append(performance(retain_after(model, report), report.higher))
        if bounded:
            by = sorted({point.attack or "no attack" for point in model.bounded.points})
            row.append(dataclasses.replace(performance(model.bounded, report.higher), remark=", ".join(by)))
        row += [ratio_cell(ratios_of(model)[header], notes) for header in ratios]
        row += [performance(model.metrics.get(key, Stat()), report.higher) for key in held_out]
        rows.append(row)
    return Table(headers, rows, notes.texts, [*evaluated(report, held_out), *left_out])


def retain_after(model: ModelReport, report: Report) -> Stat:
    """Retain performance after the headline number of attack steps, of the trial that is the worst case of forget."""
    points = model.worst.get(report.headline, Stat()).points
    return Stat(tuple(Point(p.seed, p.retain) for p in points if p.retain is not None))


def ratios_of(model: ModelReport) -> dict[tuple[str, str], Stat]:
    """R and C of a model by the headers of their columns."""
    own = {("R", "robustness"): model.robustness}
    return own | {("C", "FLOPs" if unit == "flops" else unit): stat for unit, stat in model.compute.items()}


def ratio_columns(models: Sequence[ModelReport]) -> tuple[list[tuple[str, str]], list[str]]:
    """Headers of the columns of R and C in which some model has a value, and a sentence on those that are left out.

    Returns neither for models that are not compared with data filtering.
    """
    found = [ratios_of(model) for model in models]
    wanted = [header for header in found[0] if any(own[header] or own[header].missing for own in found)] if found else []
    shown = [header for header in wanted if any(own[header] for own in found)]
    gone = [header for header in wanted if header not in shown]
    if not gone:
        return shown, []
    reasons: dict[str, list[str]] = {}
    for model, own in zip(models, found, strict=True):
        for reason in dict.fromkeys(reason for header in gone for reason in own[header].missing.values()):
            reasons.setdefault(reason, []).append(model.label)
    why = [reason if len(reasons) == 1 else f"{reason} ({', '.join(labels)})" for reason, labels in reasons.items()]
    named = (f"{name} in {unit}" if any(name == other for other, _ in shown) else name for name, unit in gone)
    names = " or ".join(dict.fromkeys(named))
    return shown, [f"No model has {names}: {'; '.join(why)}."]


def evaluated(report: Report, held_out: Sequence[str] = ()) -> list[str]:
    """A sentence on how many sequences or questions the performances of the models are measured on; none if that is not known."""
    sizes: dict[str, list[int]] = {}
    for key in ("retain", "forget", *held_out):
        known = [p.n for model in report.models for p in model.metrics.get(key, Stat()).points if p.n is not None]
        if known:
            sizes[key.replace("heldout_", "held-out ")] = known
    if not sizes:
        return []
    texts = [f"{name} {_between(known)}" for name, known in sizes.items()]
    text = f"Test {report.scored}: {', '.join(texts)}."
    few = [name for name, known in sizes.items() if min(known) < FEW]
    if few:
        what, verb = "interval" if len(report.seeds) == 1 else "value", "is"
        if len(few) > 1:
            what, verb = f"{what}s", "are"
        text += f" The {what} of {' and '.join(few)} {verb} rough, with fewer than {FEW} {report.scored}."
    return [text]


def _between(sizes: Sequence[int]) -> str:
    return str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def attack_table(report: Report) -> Table:
    """Table of worst-case forget performance, one row per attack, each at its own headline step.

    It has no rows if there is only one attack. A footnote marks attacks that do not enter the worst case.
    """
    notes = Notes()
    worst: dict[tuple[str | None, int], dict[str, list[Point]]] = {}
    theirs: set[str | None] = set()
    attacked = [model for model in report.models if model.attacks]
    for model in attacked:
        for seed, entry in model.entries.items():
            theirs |= {name for name, attack in (entry.get("attacks") or {}).items() if attack.get("needs_original")}
            for key, point in worst_by_attack(entry, seed, report.higher, report.headline).items():
                worst.setdefault(key, {}).setdefault(model.name, []).append(point)
    unit = report.unit
    headers = [("attack", ""), ("steps", ""), *((model.label, f"forget, {unit}") for model in attacked)]
    rows = [
        [
            Cell(name or "fine-tuning", marks=notes.mark(NEEDS_ORIGINAL) if name in theirs else ""),
            Cell(str(step)),
            *(performance(Stat(tuple(found.get(model.name, ()))), report.higher) for model in attacked),
        ]
        for (name, step), found in worst.items()
    ]
    return Table(headers, rows if len(worst) > 1 else [], notes.texts)


def cost_table(report: Report) -> Table:
    """Table of the training costs of each model, as means over seeds; every column of a student includes the unlearning."""
    keys = ("steps", "tokens", "flops", "seconds", "peak_bytes", "labelled_forget_tokens", "labelled_retain_tokens")
    headers = [
        ("model", ""),
        ("steps", ""),
        ("tokens", ""),
        ("FLOPs", ""),
        ("time", ""),
        ("peak memory", ""),
        ("forget tokens", "labelled"),
        ("retain tokens", "labelled"),
    ]
    rows = []
    for model in report.models:
        runs = [_chain(run) for run in model.trainings.values()]
        if not runs:
            continue
        row = [Cell(model.label)]
        for key in keys:
            values = [run[key] for run in runs if run.get(key) is not None]
            row.append(Cell(_AMOUNT.get(key, count)(sum(values) / len(values))) if values else Cell())
        rows.append(row)
    means = "Means over seeds. " if len(report.seeds) > 1 else ""
    older = any(_lacks_chain(run) for model in report.models for run in model.trainings.values())
    return Table(headers, rows, below=[means + SCOPE, *([NO_CHAIN] if older else [])])


def _chain(run: dict[str, Any]) -> dict[str, Any]:
    """The costs of a training with those of the unlearning and the cache that it needed."""
    if "chain" in run:
        return {**run, **run["chain"]}
    return {**run, **dict.fromkeys(("steps", "seconds", "peak_bytes"))} if _lacks_chain(run) else run


def _lacks_chain(run: dict[str, Any]) -> bool:
    return bool(run.get("unlearning_steps")) and "chain" not in run


def group_table(report: Report) -> Table:
    """Table of performance before the attack for each group of sequences.

    It has one row per model, or with more than 20 groups one row per group; no rows if there are no groups.
    """
    unit = report.unit
    labels = sorted({label for model in report.models for label in model.groups}, key=_group_order)
    headers = [("model", ""), *((label.replace("heldout_", "held-out "), unit) for label in labels)]
    rows = [
        [Cell(m.label), *(performance(m.groups.get(label, Stat()), report.higher) for label in labels)] for m in report.models
    ]
    if len(labels) > 20:
        names = [Cell(name) for name, _ in headers[1:]]
        turned = [list(cells) for cells in zip(names, *(row[1:] for row in rows), strict=True)]
        return Table([("group", ""), *((row[0].main, unit) for row in rows)], turned)
    return Table(headers, rows if labels else [])


def markdown(table: Table, names: int = 1) -> str:
    """Renders a table as GitHub Markdown with footnotes below; the first ``names`` columns are left-aligned."""
    lines = ["| " + " | ".join(plain(f"{name} ({unit})" if unit else name) for name, unit in table.headers) + " |"]
    lines.append("|" + "|".join(["---"] * names + ["---:"] * (len(table.headers) - names)) + "|")
    for row in table.rows:
        cells = [f"{plain(c.main)}{f' ({plain(c.small)})' if c.small else ''}{f' {c.noted}' if c.marks else ''}" for c in row]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"[{mark}] {plain(text)}" for mark, text in table.notes.items()]
    return "\n".join(lines) + "\n" + "".join(f"\n{text}\n" for text in [*notes, *map(plain, table.below)])


def plain(text: str) -> str:
    """Returns a text as Markdown that shows it in one line: no HTML, no link, no end of a cell."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("[", "\\[").replace("`", "\\`")


def csv_cell(value: object) -> object:
    """Returns a value for CSV; a text that a spreadsheet would take for a formula gets an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def terminal(report: Report) -> Group:
    """Renders the table of results for a terminal of 80 columns.

    Below each value are its range over seeds or, with one seed, the worst learning rate, and its footnotes. Held-out performance, C in tokens and,
    with several seeds, all attack steps except the headline step are only on the page.
    """
    table = results_table(report)
    several = len(report.seeds) > 1
    left_out = {("C", "tokens")} | {h for h in table.headers if h[0].startswith("held-out")}
    if several:
        left_out |= {h for h in table.headers if " after " in h[0] and h[0] != _after(report.headline)}
    shown = [index for index, header in enumerate(table.headers) if header not in left_out]
    rates = "the worst learning rate" if len(report.rates) != 1 else f"the learning rate {rate(report.rates[0])}"
    title = f"{report.title}: {'accuracy' if report.higher else 'loss'} in {report.unit}, relearning at {rates}"
    rich = RichTable(title=Text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for index in shown:
        name, unit = table.headers[index]
        head = name.replace(" steps", "").replace(" after ", "\nafter\n").replace(", ", "\n") + (
            f"\n{unit}" if name == "C" else ""
        )
        rich.add_column(head, justify="right" if index else "left", vertical="top", no_wrap=index > 0)
    for row in table.rows:
        cells = []
        for cell in (row[index] for index in shown):
            text = Text(cell.main)
            small = cell.spread if several else cell.remark.removeprefix("at ")
            if small:
                text.append(f"\n{small}", style="dim")
            if cell.marks:
                text.append(f"\n{cell.noted}", style="yellow")
            cells.append(text)
        rich.add_row(*cells)
    lines = terminal_notes(table)
    lines += [Text(order_sentence(order, report)) for order in report.orders[-1:] if order.holds is not None]
    return Group(rich, *lines)


def terminal_notes(table: Table) -> list[Text]:
    """Renders the footnotes of a table and the sentences below it for a terminal, a line each."""
    notes = [Text(f"[{mark}] {text}", style="yellow") for mark, text in table.notes.items()]
    return notes + [Text(text, style="dim") for text in table.below]


def order_sentence(order: Order, report: Report) -> str:
    """Describes the result of the order check in a sentence."""
    labels = {model.name: model.label for model in report.models}
    who = "By the means over seeds" if order.seed is None else f"Seed {order.seed}"
    chain = " → ".join(f"{labels[name]} {number(value, report.higher)}" for name, value in order.chain)
    end = (
        f" Not compared because they did not recover: {', '.join(labels[n] for n in order.left_out)}." if order.left_out else ""
    )
    if order.holds:
        verdict = "the attack never gets easier along"
    else:
        steps = (
            f"{labels[r['from']]} to {labels[r['to']]}{' (intervals overlap)' if r['intervals_overlap'] else ''}"
            for r in order.rises
        )
        verdict = f"not monotone, the attack gets easier from {'; '.join(steps)}, in"
    return f"{who}: {verdict} {chain}.{end}"


def performance(stat: Stat, higher: bool) -> Cell:
    """Cell with the mean, range and learning rates of a performance."""
    if not stat:
        return Cell()
    spread = stat.spread
    shown = f"{number(spread[0], higher)}–{number(spread[1], higher)}" if spread else ""
    return Cell(number(stat.mean, higher), shown, f"at {', '.join(map(rate, stat.rates))}" if stat.rates else "")


def number(value: float, higher: bool) -> str:
    """Formats an accuracy in per cent, or a loss in nats per token."""
    if higher:
        return f"{100 * value:.1f}"
    return "diverged" if value >= DIVERGED else f"{value:.3f}"


def ratio(value: float) -> str:
    """Formats a ratio with two decimals."""
    return f"{value + 0.0:.2f}" if abs(value) >= 0.005 else "0.00"


def rate(value: float) -> str:
    """Formats a learning rate briefly, such as 5e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def margin(report: Report) -> str:
    """Says by how much an attack may harm the retain performance for its trial to count."""
    value = 100 * report.results[0]["metric"]["retain_margin"]
    return f"retain at most {value:g} {'points' if report.higher else '%'} worse"


def count(value: float) -> str:
    """Formats a count with a suffix, such as 620, 8.05k, 1.21M."""
    for power, suffix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g}{suffix}" if value < 999.5 * 10**power else f"{value / 10**power:.0f}{suffix}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


_AMOUNT = {"flops": lambda value: f"{value:.2e}", "seconds": _duration, "peak_bytes": _bytes}


class Notes:
    """Collects footnotes in the order of their first use."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """Returns the mark of the footnote with this text; adds the footnote if it is new."""
        for mark, known in self.texts.items():
            if known == text:
                return mark
        mark = "abcdefghijklmnopqrstuvwxyz"[len(self.texts)]
        self.texts[mark] = text
        return mark


def model_marks(model: ModelReport, report: Report, notes: Notes) -> str:
    """Marks of the footnotes on a model.

    They say whether a model lacks seeds that others have, whether the teacher has hardly forgotten, in which seeds the model is
    censored, and whether a stronger attack may exist.
    """
    marks = ""
    if lacking := sorted(set(report.seeds) - set(model.entries)):
        marks += notes.mark(
            f"without seed {', '.join(map(str, lacking))}: its means are over fewer seeds than those of other rows"
        )
    if model.kind == "unlearn" and report.hardly_forgotten:
        marks += notes.mark(hardly_forgotten(report))
    if model.censored:
        where = "" if len(report.seeds) == 1 else f" in seed {', '.join(map(str, model.censored))}"
        marks += notes.mark(
            f"did not recover{where}: reached its step limit before the retain target, and enters neither R nor C"
        )
    if model.at_end_of_grid:
        marks += notes.mark(
            "only one learning rate was tried: a stronger attack may exist at another"
            if len(model.rates) == 1
            else "the worst learning rate is at an end of the grid: a stronger attack may lie beyond it"
        )
    return marks


def hardly_forgotten(report: Report) -> str:
    """Says why the teacher counts as having hardly forgotten, and what to do."""
    why = "accuracy is more than nine tenths of the original's"
    if not report.higher:
        why = f"loss is less than {-math.log(KEPT):.3f} nats/token above the original's"
    return (
        f"the teacher has hardly forgotten, because its forget {why}: raise unlearn.train.steps or unlearn.train.lr before you "
        "trust the rest"
    )


def ratio_cell(stat: Stat, notes: Notes) -> Cell:
    """Cell of R or C: mean, range, and footnotes on why values are missing."""
    marks = "".join(dict.fromkeys(notes.mark(f"n/a: {reason}") for reason in stat.missing.values()))
    if not stat:
        return Cell("n/a" if stat.missing else NONE, marks=marks)
    spread = stat.spread
    shown = f"{ratio(spread[0])}–{ratio(spread[1])}" if spread else ""
    remark = f"{len(stat.points)} of {len(stat.points) + len(stat.missing)} seeds" if stat.missing else ""
    return Cell(ratio(stat.mean), shown, remark, marks)


def _columns(report: Report) -> list[int]:
    """Attack steps that get a column: the headline step, the last, and some spread between."""
    steps = [step for step in report.steps if step > 0]
    if len(steps) <= MAX_STEPS:
        return steps
    kept = {steps[-1], report.headline} & set(steps)
    for index in range(MAX_STEPS):
        if len(kept) < MAX_STEPS:
            kept.add(steps[index * (len(steps) - 1) // MAX_STEPS])
    return sorted(kept)


def _after(step: int) -> str:
    return f"forget after {step} steps"


def _group_order(label: str) -> tuple[int, str]:
    keys = ("retain", "forget", "heldout_retain", "heldout_forget")
    key = label.partition(" ")[0]
    return (keys.index(key) if key in keys else len(keys), label)
