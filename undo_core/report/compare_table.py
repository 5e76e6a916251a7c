"""Table of the methods before and after UNDO, as Markdown, LaTeX, CSV and for the terminal."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from undo_core.report.claims import PUBLISHED, label_shares
from undo_core.report.metrics import Stat
from undo_core.report.over_seeds import ABOUT, compared, differences_table, medians_table, order_sentences
from undo_core.report.points import COMPARED, Setting
from undo_core.report.table import (
    NONE,
    Cell,
    Notes,
    Table,
    csv_cell,
    markdown,
    model_marks,
    performance,
    plain,
    rate,
    ratio_cell,
    terminal_notes,
)

_TEX = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}"}
_TEX |= {"^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "–": "--", "α": r"$\alpha$", "β": r"$\beta$", "−": "$-$"}
_TEX |= {"<": "$<$", ">": "$>$", "|": "$|$", "\u00a0": "~"}


def methods_table(settings: Sequence[Setting]) -> Table:
    """Table of performance, worst case after relearning, R and C.

    Each method has three rows: before UNDO, after UNDO, and data filtering. If there is only one method, every model except the
    original has a row.
    """
    report, notes = settings[0].report, Notes()
    unit = report.unit
    headers = [("method", ""), ("model", ""), ("retain", unit), ("forget", unit)]
    headers += [(f"after {report.headline} steps", f"forget, {unit}"), ("worst attack", "")]
    headers += [("R", "robustness"), ("C", "steps"), ("C", "FLOPs")]
    rows = []
    for setting in settings:
        models = (
            setting.compared(*COMPARED) if len(settings) > 1 else (m for m in setting.report.models if m.kind != "original")
        )
        for model in models:
            if model.kind == "filter" and setting.lender:
                continue  # it is already a row of the lending setting
            name = "before UNDO" if model.kind == "unlearn" else model.label
            row = [Cell(setting.label), Cell(name, marks=model_marks(model, setting.report, notes))]
            row += [performance(model.metrics.get(key, Stat()), report.higher) for key in ("retain", "forget")]
            worst = model.worst.get(report.headline, Stat())
            shown = performance(worst, report.higher)
            row += [Cell(shown.main, shown.spread), Cell(_attack(worst))]
            stats = (model.robustness, model.compute.get("steps", Stat()), model.compute.get("flops", Stat()))
            row += [ratio_cell(stat, notes) for stat in stats]
            if setting.lender and model.kind == "undo":
                text = (
                    f"relative to the data filtering of {setting.lender}: C counts its training up to this retain target, R "
                    "uses its final model"
                )
                row[-3:] = [dataclasses.replace(cell, marks=cell.marks + notes.mark(text)) for cell in row[-3:]]
            rows.append(row)
    return Table(headers, rows, notes.texts)


def methods_markdown(title: str, settings: Sequence[Setting], table: Table, said: Mapping[str, Sequence[str]]) -> str:
    """Renders the table, the statistics over seeds and the sentences on the published claims as Markdown."""
    parts = [f"# {plain(title)}", markdown(table, names=2).rstrip()]
    if (medians := medians_table(settings)).rows:
        comparisons = compared(settings)
        parts += ["## Over the seeds", markdown(medians, names=2).rstrip(), ABOUT]
        parts.append(markdown(differences_table(settings[0].report, comparisons)).rstrip())
        parts.append("\n".join(f"- {plain(text)}" for text in order_sentences(settings[0].report, comparisons)))
    if any(said.values()):
        parts.append("## Beside the published claims")
        parts.append(PUBLISHED)
        named = [(f"{label}: " if len(said) > 1 else "", text) for label, texts in said.items() for text in texts]
        parts.append("\n".join(f"- {plain(label + text)}" for label, text in named))
    return "\n\n".join(parts) + "\n"


def latex(table: Table) -> str:
    """Renders a LaTeX ``tabular`` that needs no package, with ranges in parentheses and footnotes below."""
    lines = [rf"\begin{{tabular}}{{ll{'r' * (len(table.headers) - 2)}}}", r"\hline"]
    lines.append(" & ".join(_tex(name) for name, _ in table.headers) + r" \\")
    lines.append(" & ".join(_tex(unit) for _, unit in table.headers) + r" \\")
    lines.append(r"\hline")
    for row in table.rows:
        cells = []
        for cell in row:
            spread = f" ({_tex(cell.spread)})" if cell.spread else ""
            marks = f"$^{{{','.join(sorted(cell.marks))}}}$" if cell.marks else ""
            cells.append(f"{_tex(cell.main)}{spread}{marks}")
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    lines += [rf"\par {{\footnotesize $^{{{mark}}}$ {_tex(text)}}}" for mark, text in table.notes.items()]
    return "\n".join(lines) + "\n"


def methods_csv(settings: Sequence[Setting]) -> str:
    """CSV of every model of every method: mean, smallest and largest seed; empty where there is no value."""
    stats = ("retain", "forget", "forget_attacked", "R", "C_steps", "C_tokens", "C_flops")
    names = ["method", "model", "kind", "alpha", "seeds", "censored_seeds"]
    names += [f"{stat}{part}" for stat in stats for part in ("", "_min", "_max")]
    names += ["headline_step", "metric", "labelled_share_of_pretraining", "runs"]
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for setting in settings:
        report = setting.report
        shares = [labelled / tokens for labelled, tokens in label_shares(report).values()]
        for model in report.models:
            if model.kind == "filter" and setting.lender:
                continue
            row = {"method": setting.label, "model": model.name, "kind": model.kind, "alpha": model.alpha}
            row |= {"seeds": _list(model.entries), "censored_seeds": _list(model.censored), "runs": _list(setting.runs)}
            row |= {"headline_step": report.headline, "metric": report.kind}
            if shares and model.kind in ("unlearn", "undo", "random"):
                row["labelled_share_of_pretraining"] = sum(shares) / len(shares)
            values = [model.metrics.get("retain"), model.metrics.get("forget"), model.worst.get(report.headline)]
            values += [model.robustness, *model.compute.values()]
            for name, stat in zip(stats, values, strict=False):
                if stat:
                    points = [point.value for point in stat.points]
                    row |= {name: stat.mean, f"{name}_min": min(points), f"{name}_max": max(points)}
            writer.writerow({name: csv_cell(value) for name, value in row.items()})
    return out.getvalue()


def terminal(table: Table) -> Group:
    """Renders the means for a terminal of 80 columns.

    Ranges, worst attacks, C in FLOPs and, if there is only one method, its name are only on the page.
    """
    rich = RichTable(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    left_out = [("worst attack", ""), ("C", "FLOPs")]
    if len({row[0].main for row in table.rows}) == 1:
        left_out.append(("method", ""))
    shown = [index for index, header in enumerate(table.headers) if header not in left_out]
    for name, unit in (table.headers[index] for index in shown):
        left, small = name in ("method", "model"), unit if name != "R" else ""
        heading = f"{name}\n{small}".rstrip()
        rich.add_column(heading, justify="left" if left else "right", overflow="fold", no_wrap=name == "model")
    before = ""
    for row in table.rows:
        cells = [Text(f"{row[index].main} {row[index].noted}".rstrip()) for index in shown]
        if 0 in shown and row[0].main == before:
            cells[0] = Text("")
        before = row[0].main
        rich.add_row(*cells)
    return Group(rich, *terminal_notes(table))


def _attack(stat: Stat) -> str:
    """Names of the attacks, with their rates, that gave the worst cases."""
    rates: dict[str, set[float]] = {}
    for point in stat.points:
        rates.setdefault(point.attack or "fine-tuning", set()).update([] if point.rate is None else [point.rate])
    named = {name: ", ".join(map(rate, sorted(found))) for name, found in sorted(rates.items())}
    return "; ".join(f"{name} at {found}" if found else name for name, found in named.items()) or NONE


def _list(values: object) -> str:
    return " ".join(map(str, values))  # type: ignore[call-overload]


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
