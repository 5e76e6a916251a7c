"""The command of the vocabulary benchmarks: chooses the rows, keeps those that the results have, and prints them.

The results file is replaced atomically after every row. Rows that it already has are not measured again, except those named
with --only, or all with --fresh. --accuracy measures only the errors again, in the rows that the file has.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ceilings
import harness
import torch
from measuring import LEAST, MOST, ROW_SECONDS, Section, Suite, measure, remeasure_accuracy, worker
from problems import ALL, DEFAULT, Row
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FORMAT = 2  # since 2: errors are those of the timed step on the row's own inputs, and what ran is recorded with both
CAPTURED = "captured"  # name for --only of the rows on hidden states of trained models

console = Console(highlight=False)


def show(row: dict[str, Any]) -> None:
    """Prints a row of the results, with a table for each mode."""
    softcap = "" if row["softcap"] is None else f", softcap {row['softcap']:g}"
    size = f"{row['tokens']:,} tokens × {row['vocabulary']:,}, width {row['width']}, {row['dtype']}{softcap}"
    undo, products = harness.contender(row, "undo-core"), harness.contender(row, "products")
    said = []
    for mode, kept, words in (
        ("both", "memory", "forward and backward"),
        ("forward", "forward_memory", "forward alone"),
    ):
        console.print(f"{row['id']}: {size}; {words}", style="bold")
        table = Table(box=None, pad_edge=False)
        table.add_column("contender", no_wrap=True)
        headings = ["time", "× undo-core", "× products", "floor", "memory", *(["error"] if mode == "both" else [])]
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for record in row["contenders"]:
            cells = [
                harness.seconds(harness.median(record, mode)),
                harness.times(harness.ratio(record, undo, mode)),
                harness.times(harness.ratio(record, products, mode)),
                harness.share(ceilings.of_floor(row, record, mode)),
                harness.megabytes(record.get(kept, {}).get("extra_bytes")),
                harness.percent(harness.gradient_error(record)),
            ]
            table.add_row(record["label"], *cells[: len(headings)])
        console.print(table)
    for record in row["contenders"]:
        remarks = [] if record["status"] == "measured" else [record["status"]]
        remarks += [f"{mode}: {harness.path(ran)}" for mode, ran in record.get("ran", {}).items() if ran]
        if remarks + record["notes"]:
            said.append(f"{record['label']}: {'; '.join(remarks + record['notes'])}")
    rates = row.get("ceilings")
    if rates:
        console.print(
            f"floor: its time over the contender's; the owed products at {rates['flops'] / 1e9:,.0f} GFLOP/s, or inputs and "
            f"gradients at {rates['bytes_per_s'] / 1e9:,.1f} GB/s, both measured just before. memory: peak beyond inputs and "
            "gradients. error: of the gradients, against float64",
            style="dim",
            soft_wrap=True,
        )
    for line in said:
        console.print(line, style="dim", soft_wrap=True)
    console.print()


# -- the command ---------------------------------------------------------------------------------------------------------------


def parse(suite: Suite, description: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    known = [row.id for row in (*suite.rows["cpu"], *suite.rows["cuda"])]
    script = suite.script
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""rows:        {", ".join([*known, CAPTURED, *suite.sections])}
groups:      {DEFAULT}, {ALL}
contenders:  {", ".join(suite.contenders)}

examples:
  python {script}                                     the default rows that this machine's file lacks
  python {script} --all                               every row
  python {script} --only {known[0]}                      this one again
  python {script} --accuracy                          the errors of the rows that the file has, without timing
  python {script} --quick                             tiny problems, to see that it works; to runs/bench/
  python {script} --activations                       on hidden states of small models, trained in seconds
  python {script} --activations runs/NAME/stages/distill-KEY      on those of a distilled student and its teacher
  python {script} --device cuda --rounds 20           on a GPU
  python bench/tables.py docs/benchmarks.md RESULTS.json       then: the tables of docs/benchmarks.md
  python bench/plot.py                                and the pictures, of this machine's files

Close other programs first. Peers: pip install -c constraints.txt -e '.[bench]'; one that is missing is a row that says so.""",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure these rows or groups, even if the file has them")
    parser.add_argument("--all", action="store_true", help="measure every row that the file lacks, not only the default ones")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="measure only these contenders")
    parser.add_argument(
        "--activations",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure rows on hidden states: those of a distill stage, or generated ones",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"timed rounds (default: {LEAST} to {MOST} in {ROW_SECONDS:g} s; 2 with --quick)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="results (default: bench/results/SUITE-DEVICE/MACHINE-VERSION.json)"
    )
    parser.add_argument(
        "--accuracy",
        action="store_true",
        help="measure only errors, of the file's rows or of those named; needs no quiet machine",
    )
    parser.add_argument("--quick", action="store_true", help="use tiny problems; their numbers mean nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the file and measure every row")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurement of memory")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = (suite.quick if options.quick else suite.rows)[options.device]
    extra = [CAPTURED] if options.activations is not None else []
    for flag, given, wanted in (
        ("--only", options.only, [*(row.id for row in rows), DEFAULT, ALL, *suite.sections, *extra]),
        ("--contenders", options.contenders, list(suite.contenders)),
    ):
        for name in given or ():
            if name not in wanted:
                parser.error(f"{flag}: got {name!r}, wanted some of {', '.join(wanted)}")
    options.least = None if options.rounds is not None or options.quick else LEAST
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else MOST
    for flag, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"{flag}: got {value}, wanted an integer >= 1")
    if options.accuracy and options.activations is not None:
        parser.error("--accuracy: got --activations too, wanted one of them: captured rows are verified when they are timed")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', but torch sees no GPU here")
    if options.device == "cpu" and not options.no_memory and not sys.platform.startswith("linux"):
        parser.error("memory is measured through Linux's /proc; add --no-memory")
    if options.activations:
        import activations

        try:
            activations.check(Path(options.activations))
        except ValueError as error:
            parser.error(str(error))
    return options


def load(path: Path, suite: str, options: argparse.Namespace, sections: Mapping[str, tuple[str, Section]]) -> dict[str, Any]:
    """Returns the existing results, or an empty record."""
    empty = {"format": FORMAT, "suite": suite, "machine": harness.machine(options.device), "rows": []}
    empty |= {key: None for key, _ in sections.values()}
    if options.fresh or not path.exists():
        return empty
    found = json.loads(path.read_text())
    if found.get("format") != FORMAT or found.get("suite") != suite:
        raise SystemExit(
            f"{path}: got format {found.get('format')} of {found.get('suite')}, wanted {FORMAT} of {suite}; try --fresh"
        )
    theirs, own = harness.processor(found["machine"]), harness.processor(empty["machine"])
    if theirs != own:
        raise SystemExit(f"{path}: got rows of {theirs}, wanted {own}; try --fresh or another --out")
    return empty | found | {"machine": empty["machine"]}


def same_problem(found: dict[str, Any], row: Row) -> bool:
    return all(found.get(key) == value for key, value in json.loads(json.dumps(asdict(row))).items() if key != "contenders")


@contextmanager
def captured(options: argparse.Namespace, contenders: tuple[str, ...]) -> Iterator[list[tuple[Row, Path | None]]]:
    """Returns the rows that ``--activations`` asks for, one for each dtype, and the file with their inputs."""
    if options.activations is None:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="bench-activations-") as folder:
        import activations  # imports transformers

        given = options.activations
        inputs = activations.capture(Path(given)) if given else activations.generated(options.quick)
        file = Path(folder) / "inputs.safetensors"
        activations.save(inputs, file)
        (tokens, width), vocabulary = inputs.student_hidden.shape, inputs.student_weight.shape[0]
        shape = (tokens, vocabulary, width)
        source = Path(options.activations).resolve().name if options.activations else "generated"
        yield [
            (Row(f"{CAPTURED}-{short}", *shape, dtype, inputs.softcap, contenders, ALL, source), file)
            for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
        ]


@contextmanager
def refused(path: Path) -> Iterator[None]:
    """Turns an error about a figure that does not belong to what was timed into one line; the figure is not written."""
    try:
        yield
    except harness.AnotherPath as error:
        raise SystemExit(f"{error}; {path} stays as it was") from None


def main(suite: Suite, description: str, arguments: Sequence[str] | None = None) -> None:
    options = parse(suite, description, arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        worker(suite, json.loads(options.worker))
        return
    harness.commit()  # asked for first: the commit of the code that runs, even if files change meanwhile
    given = list(sys.argv[1:] if arguments is None else arguments)
    if options.out and "--out" in given:  # the file's path does not change what was measured
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    options.provenance = lambda: harness.provenance(suite.script, given)
    name = f"{suite.name}-{options.device}" + ("-quick" if options.quick else "")
    path = options.out or harness.results_path(suite.name, options.device, options.quick)
    results = load(path, name, options, suite.sections)
    rows = [(row, None) for row in (suite.quick if options.quick else suite.rows)[options.device]]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        captured(options, rows[0][0].contenders) as further,
        Progress(*columns, console=console, transient=True) as progress,
        refused(path),
    ):
        rows += further
        there = {found["id"]: found for found in results["rows"]}
        order = list(dict.fromkeys([*(row.id for row, _ in rows), *there]))
        for row, file in rows:
            found = there.get(row.id)
            found = found if found is not None and same_problem(found, row) else None
            kept = found is not None and found["rounds"] > 0
            groups = {row.id, ALL, row.group} if file is None else {row.id, CAPTURED}
            if options.only:
                wanted = bool(groups & set(options.only))
            elif options.activations is not None:
                wanted = file is not None
            elif options.accuracy:
                wanted = found is not None
            else:
                wanted = not kept and (options.all or options.quick or row.group == DEFAULT)
            if not wanted:
                continue
            if options.accuracy:
                there[row.id] = remeasure_accuracy(suite, row, found, options, progress)
            else:
                there[row.id] = measure(suite, row, options, progress, file)
            results["rows"] = [there[name] for name in order if name in there]
            harness.write_json(path, results)
            show(there[row.id])
        for section, (key, compute) in suite.sections.items():
            missing = options.activations is None and (results[key] is None or options.accuracy)
            if section in options.only if options.only else missing:
                results[key] = compute(options.device, options, progress)
                harness.write_json(path, results)
                suite.shows[section](results[key])
    console.print(f"results: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
