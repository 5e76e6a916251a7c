"""Records runs and sweeps of the demo, and writes their tables between markers into the pages under docs.

    python bench/study_tables.py                       writes the tables from bench/results
    python bench/study_tables.py --check               fails if a page differs from them
    python bench/study_tables.py --record runs/sweep-study    first copies finished results into bench/results/NAME, and the report's
                                                       tables, values and figures into docs/results/NAME

``<!-- study:methods -->`` ... ``<!-- /study:methods -->`` encloses a table. Over several seeds, values are medians with their bootstrap
intervals in parentheses (``undo_core/report/seeds.py``). The folder that is recorded keeps its name, one of ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from undo_core.cli import results as command
from undo_core.io.files import replace_folder, write_bytes
from undo_core.report.alpha_search import alpha_table
from undo_core.report.attacks import Point, bounded, worst_by_attack
from undo_core.report.claims import labelled_tokens
from undo_core.report.compare import compare, load
from undo_core.report.correlation import correlation_table
from undo_core.report.inside import measure_table
from undo_core.report.metrics import ModelReport, Report, Stat
from undo_core.report.over_seeds import Comparison, compared, differences_table, median_cell, order_sentences
from undo_core.report.points import Setting
from undo_core.report.search import search_table
from undo_core.report.slowdown import slowdown_table
from undo_core.report.table import Cell, Notes, Table, attack_table, markdown, number, performance, ratio, ratio_cell

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench") / "results"
BLOCK = re.compile(r"(<!-- study:(?P<name>[a-z-]+) -->\n).*?(<!-- /study:(?P=name) -->)", re.S)
RUN = "undo run configs/arithmetic-cpu.yaml"
COMMANDS = {  # what makes each recorded folder: its title, and the command
    "sweep-alpha": ("Robustness over alpha", "undo sweep configs/sweep-alpha.yaml"),
    "sweep-methods": ("Every method before and after UNDO", "undo sweep configs/sweep-methods.yaml"),
    "sweep-newer-methods": ("Newer methods beside MaxEnt", "undo sweep configs/sweep-newer-methods.yaml"),
    "sweep-attacks": ("Every attack", "undo sweep configs/sweep-attacks.yaml"),
    "sweep-labels": ("Budgets of labels", "undo sweep configs/sweep-labels.yaml"),
    "sweep-study": ("The headline rows over five seeds", "undo sweep configs/sweep-study.yaml"),
    "sweep-on-policy": ("On-policy distillation", "undo sweep configs/sweep-on-policy.yaml"),
    "sweep-leak-channels": ("Leak channels over three seeds", "undo sweep configs/sweep-leak-channels.yaml"),
    "leak-channels": ("Leak channels", f"{RUN} --config configs/leak-channels.yaml --config configs/inside.yaml"),
    "inside": (
        "Interventions and measures",
        f"{RUN} --config configs/interventions.yaml --config configs/inside.yaml --name inside --output runs/inside",
    ),
    "search": (
        "An attacker that searches",
        f"{RUN} --config configs/attack-search.yaml --name search --output runs/search --attacks.searched.budget=0.5 --noise.alphas='[0.8]' "
        "--controls.random=false --controls.oracle_steps=0",
    ),
    "alpha": (
        "The cheapest alpha",
        f"{RUN} --target-robustness 0.9 --name alpha --output runs/alpha --controls.random=false --controls.oracle_steps=0",
    ),
}
MARGIN = 0.05  # by which an attack may lower the retain accuracy and still leave the model useful
EMBEDDING = "only-embedding-redrawn"
KEPT = ("*.md", "*.csv", "*.tex", "*.png")  # files of a report that docs/results keeps, where it has files of that name already


def main() -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page differs from the results")
    parser.add_argument("--record", type=Path, help="folder of a finished run or sweep, from the repository's root")
    options = parser.parse_args()
    if options.record is not None:
        record(options.record)
    differ = [page for page in pages() if written(page.read_text()) != page.read_text()]
    for page in differ:
        if options.check:
            print(f"{page.relative_to(ROOT)} differs from bench/results: python bench/study_tables.py")
        else:
            page.write_text(written(page.read_text()))
    return int(options.check and bool(differ))


def pages() -> list[Path]:
    """The pages with a table."""
    return [page for page in sorted((ROOT / "docs").rglob("*.md")) if BLOCK.search(page.read_text())]


def written(text: str) -> str:
    """The page with every table made again."""
    return BLOCK.sub(lambda found: f"{found[1]}{table_of(found['name'])}\n{found[3]}", text)


def table_of(name: str) -> str:
    """The text between a pair of markers."""
    recorded, make = TABLES[name]
    folder = ROOT / RESULTS / recorded
    if not folder.exists():
        return f"Not recorded yet: `{COMMANDS[recorded][1]}`, then `python bench/study_tables.py --record runs/{recorded}`."
    settings = compare(load([folder]), recorded)
    seeds = list(map(str, settings[0].report.seeds))
    if len(seeds) == 1:
        said = f"Seed {seeds[0]}; in parentheses the 95 % interval over the test sequences."
    else:
        said = f"Medians over seeds {', '.join(seeds)}; in parentheses the 95 % bootstrap interval over seeds."
    return f"{said}\n\n{make(settings)}"


def record(finished: Path) -> None:
    """Copies finished results and their report into the repository; an earlier record is replaced once both are made."""
    finished = ROOT / finished
    name = finished.resolve().name
    if name not in COMMANDS:
        raise SystemExit(f"--record: got {finished}, wanted a folder named {', '.join(COMMANDS)}")
    found = sorted([*finished.glob("results-seed*.json"), *finished.glob("runs/*/results-seed*.json")])
    if not found:
        raise SystemExit(f"--record: got {finished}, which has no results-seedN.json; wanted a finished run or sweep")
    into, pages = ROOT / RESULTS / name, ROOT / "docs" / "results" / name
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".recording-", dir=into.parent) as temporary:
        copied, made = Path(temporary) / RESULTS / name, Path(temporary) / "report"
        for path in found:
            copy = copied / path.relative_to(finished)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        made.mkdir()
        with contextlib.chdir(temporary):  # the report names the folder of each run: that in the repository
            command.report([str(RESULTS / name)], str(made), COMMANDS[name][0])
        replace_folder(copied, into)
        pages.mkdir(parents=True, exist_ok=True)
        known = {path.name for path in pages.iterdir()}
        for path in (path for pattern in KEPT for path in made.glob(pattern)):
            if path.name in known or not known:
                write_bytes(pages / path.name, path.read_bytes())


def alphas(settings: Sequence[Setting]) -> str:
    """Every model of one setting: performance, R and C, and the orders that the seeds show."""
    report, notes = settings[0].report, Notes()
    columns = ["retain, %", f"forget after {report.headline} steps, %", "R", "C, steps", "C, FLOPs"]
    rows = [
        [Cell(model.label), *_scores(model, report, notes), *_ratios(model, notes)] for model in report.models if model.worst
    ]
    return f"{_table(['model', *columns], rows, notes)}\n\n{orders(settings)}"


def methods(settings: Sequence[Setting]) -> str:
    """One row for each method: the unlearned model, its students, and R and C of the one with the largest alpha."""
    report, notes = settings[0].report, Notes()
    students = [model.label for model in settings[0].report.of("undo")]
    students = [label for label in students if all(_named(s, label) for s in settings)]
    strongest = students[-1]
    columns = ["retain, %", "forget, %", "unlearn only, attacked, %", *(f"{label}, attacked, %" for label in students)]
    columns += [f"{strongest}, retain, %", "R", "C, steps", "C, FLOPs"]
    rows = []
    for setting in settings:
        (unlearned,) = setting.report.of("unlearn")
        best = _named(setting, strongest)
        cells = [_percent(unlearned.metrics[key], notes) for key in ("retain", "forget")]
        cells += [
            _percent(model.worst[report.headline], notes)
            for model in (unlearned, *(_named(setting, label) for label in students))
        ]
        rows.append([Cell(setting.label), *cells, _percent(best.metrics["retain"], notes), *_ratios(best, notes)])
    for model in (model for setting in settings if not setting.lender for model in setting.report.of("filter")):
        cells = [_percent(model.metrics[key], notes) for key in ("retain", "forget")]
        rows.append(
            [Cell(model.label), *cells, _percent(model.worst[report.headline], notes), *[Cell("")] * (len(columns) - 3)]
        )
    return _table(["method", *columns], rows, notes)


def orders(settings: Sequence[Setting]) -> str:
    """The paired differences, and the orders that the seeds show."""
    return _differences(settings[0].report, compared(settings))


def methods_and_orders(settings: Sequence[Setting]) -> str:
    """Both of these tables."""
    return f"{methods(settings)}\n\n{orders(settings)}"


def headline(settings: Sequence[Setting]) -> str:
    """The methods over more seeds, MaxEnt's alphas, and the orders between methods."""
    return "\n\n".join([methods(settings), alphas([_with_filter(settings)]), orders(settings)])


def attacks(settings: Sequence[Setting]) -> str:
    """The worst case of every attack at its own headline step, and the worst over all that leaves the model useful."""
    report, notes = settings[0].report, Notes()
    models = [model for model in report.models if model.attacks]
    worst: dict[tuple[str | None, int], dict[str, list[Point]]] = {}
    for model in models:
        for seed, entry in model.entries.items():
            for key, point in worst_by_attack(entry, seed, report.higher, report.headline).items():
                worst.setdefault(key, {}).setdefault(model.name, []).append(point)
    rows = [
        [Cell(name or "fine-tuning"), Cell(str(step)), *(_percent(Stat(tuple(found.get(m.name, ()))), notes) for m in models)]
        for (name, step), found in worst.items()
    ]
    margin = {**report.results[0]["metric"], "retain_margin": MARGIN}
    useful = [[bounded(entry, seed, margin) for seed, entry in model.entries.items()] for model in models]
    label = f"any that leaves the model useful (retain at most {100 * MARGIN:g} points worse)"
    rows.append([Cell(label), Cell("any"), *(_percent(Stat(tuple(filter(None, found))), notes) for found in useful)])
    return _table(["attack", "steps", *(f"{model.label}, %" for model in models)], rows, notes)


def labels(settings: Sequence[Setting]) -> str:
    """One row for each budget of labels."""
    columns = ["labelled forget tokens", "forget before the attack, %", "UNDO, attacked, %", "R", "C, steps"]
    rows, notes = [], Notes()
    for setting in settings:
        (unlearned,), student = setting.report.of("unlearn"), setting.report.strongest
        tokens = [labelled_tokens(entry)["forget"] for entry in unlearned.entries.values()]
        cells = [median_cell(Stat(tuple(Point(seed, t) for seed, t in enumerate(tokens))), lambda v: f"{v:.0f}", notes)]
        cells += [_percent(unlearned.metrics["forget"], notes), _percent(student.worst[setting.report.headline], notes)]
        rows.append([Cell(setting.label), *cells, *_ratios(student, notes)[:2]])
    return _table(["forget sequences", *columns], rows, notes)


def students(settings: Sequence[Setting]) -> str:
    """One row for each attacked model of all settings: performance before and after the attack, R and C."""
    first, notes = settings[0].report, Notes()
    steps = [step for step in first.steps if step > 0]
    headers = ["model", "retain, %", "forget, %", *(f"after {step} steps, %" for step in steps), "R", "C, steps", "C, FLOPs"]
    rows: dict[str, list[Cell]] = {}
    for setting in settings:
        for model in (model for model in setting.report.models if model.worst):
            label = f"{model.label}, {setting.label}" if model.kind == "undo" and len(settings) > 1 else model.label
            stats = [*(model.metrics[key] for key in ("retain", "forget")), *(model.worst.get(step, Stat()) for step in steps)]
            if len(first.seeds) > 1:
                cells = [*(_percent(stat, notes) for stat in stats), *_ratios(model, notes)]
            else:
                found = (model.robustness, model.compute["steps"], model.compute["flops"])
                cells = [*(performance(stat, first.higher) for stat in stats), *(ratio_cell(stat, notes) for stat in found)]
            rows.setdefault(label, [Cell(label), *cells])
    return _table(headers, list(rows.values()), notes)


def beside_noise(settings: Sequence[Setting]) -> str:
    """The paired differences of the student with a new embedding from the students of noise alone, of the same seeds in the other sweep."""
    (student,) = (model for setting in settings if (model := _named(setting, EMBEDDING)))
    own = _with_filter(compare(load([ROOT / RESULTS / "sweep-study"]), "sweep-study"))
    comparisons = [Comparison((student.label, model.label), "", student, model) for model in own.report.of("undo")]
    return _differences(own.report, comparisons)


def of_the_report(*tables: Callable[[Report], Table]) -> Callable[[Sequence[Setting]], str]:
    """Tables as the run's report shows them."""
    return lambda settings: "\n\n".join(markdown(table(settings[0].report)).rstrip() for table in tables)


TABLES: dict[str, tuple[str, Callable[[Sequence[Setting]], str]]] = {
    "alpha": ("sweep-alpha", alphas),
    "methods": ("sweep-methods", methods),
    "methods-orders": ("sweep-methods", orders),
    "newer-methods": ("sweep-newer-methods", methods_and_orders),
    "attacks": ("sweep-attacks", attacks),
    "labels": ("sweep-labels", labels),
    "headline": ("sweep-study", headline),
    "on-policy": ("sweep-on-policy", students),
    "leak": ("leak-channels", students),
    "leak-seeds": ("sweep-leak-channels", students),
    "leak-noise": ("sweep-leak-channels", beside_noise),
    "leak-measures": ("leak-channels", of_the_report(correlation_table)),
    "interventions": ("inside", of_the_report(attack_table)),
    "measures": ("inside", of_the_report(measure_table, correlation_table)),
    "search": ("search", of_the_report(attack_table, search_table)),
    "slowdown": ("search", of_the_report(slowdown_table)),
    "cheapest-alpha": ("alpha", of_the_report(alpha_table)),
}


def _table(headers: Sequence[str], rows: list[list[Cell]], notes: Notes) -> str:
    return markdown(Table([(name, "") for name in headers], rows, notes.texts)).rstrip()


def _differences(report: Report, comparisons: Sequence[Comparison]) -> str:
    said = "\n".join(f"- {sentence}" for sentence in order_sentences(report, comparisons))
    return f"{markdown(differences_table(report, comparisons)).rstrip()}\n\n{said}"


def _with_filter(settings: Sequence[Setting]) -> Setting:
    """The setting whose data filtering the others use."""
    return next(setting for setting in settings if setting.report.of("filter") and not setting.lender)


def _scores(model: ModelReport, report: Report, notes: Notes) -> list[Cell]:
    return [_percent(stat, notes) for stat in (model.metrics.get("retain", Stat()), model.worst.get(report.headline, Stat()))]


def _ratios(model: ModelReport, notes: Notes) -> list[Cell]:
    return [median_cell(stat, ratio, notes) for stat in (model.robustness, model.compute["steps"], model.compute["flops"])]


def _percent(stat: Stat, notes: Notes) -> Cell:
    return median_cell(stat, lambda value: number(value, True), notes)


def _named(setting: Setting, label: str) -> ModelReport | None:
    return next((model for model in setting.report.models if model.label == label), None)


if __name__ == "__main__":
    raise SystemExit(main())
