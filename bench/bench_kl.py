"""Forward + backward of linear_kl_div beside what a user would take instead, on this machine, in one process.

Every contender is first checked against a float64 oracle on a small problem; one that computes something else is not timed.
Then, row by row: peak extra memory (a fresh process each on a CPU), and interleaved rounds of time. The file is replaced, whole or
not at all, after every row; rows that it has already are not measured again unless they are named with --only or --fresh is given.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import harness
import peers
import torch
from peers import CONTENDERS, Contender, Inputs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Largest relative errors (loss, gradients) of "same"; beyond the second pair a contender computes something else.
TOLERANCE = {"float32": ((1e-5, 1e-4), (1e-4, 1e-3)), "bfloat16": ((1e-3, 1e-2), (2e-2, 2e-1))}
ERROR_TARGETS = [10.0**-k for k in range(7)]
ERROR_SEEDS = 3

console = Console(highlight=False)


@dataclass(frozen=True)
class Row:
    """One problem size and who runs it."""

    id: str
    tokens: int
    vocabulary: int
    width: int
    dtype: str
    softcap: float | None
    contenders: tuple[str, ...]


CPU = ("undo-core", "undo-reference", "plain", "compile", "liger-chunked", "trl", "products")
CUDA = ("undo-core", "undo-core-lse", "undo-reference", "plain", "compile", "liger-triton", "trl", "products")
ROWS = {
    "cpu": [
        Row("f32-32k", 1024, 32000, 320, "float32", None, CPU),
        Row("f32-32k-softcap", 1024, 32000, 320, "float32", 30.0, ("undo-core", "products")),
        Row("f32-256k", 512, 256000, 320, "float32", None, ("undo-core", "undo-core-workspace", *CPU[1:])),
        Row("bf16-32k", 1024, 32000, 320, "bfloat16", None, CPU),
        Row("bf16-256k", 512, 256000, 320, "bfloat16", None, CPU),
    ],
    "cuda": [Row(f"bf16-256k-d{width}", 8192, 256000, width, "bfloat16", 30.0, CUDA) for width in (2304, 768, 320)],
}
QUICK = {
    device: [
        Row(f"quick-{short}", 64, 1000, 32, dtype, None, names) for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    ]
    for device, names in (("cpu", ("undo-core", "undo-core-workspace", *CPU[1:])), ("cuda", CUDA))
}
ERROR = "error"  # the section on gradient error against KL, by the name that --only knows it by


# -- problems and the oracle ---------------------------------------------------------------------------------------------------


def draw(row: Row, device: str, seed: int = 0) -> Inputs:
    """Student and teacher unrelated, logits of standard deviation 2: the time of no contender depends on the values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, scale: float) -> torch.Tensor:
        return torch.randn(rows, row.width, generator=generator).mul_(scale).to(device, DTYPES[row.dtype])

    scale = 2.0 / math.sqrt(row.width)
    student = [normal(row.tokens, 1.0).requires_grad_(), normal(row.vocabulary, scale).requires_grad_()]
    return Inputs(*student, normal(row.tokens, 1.0), normal(row.vocabulary, scale), softcap=row.softcap)


def small(dtype: str, device: str, seed: int, step: float | None = None, spread: float = 2.0) -> Inputs:
    """Odd sizes and two widths. Unrelated heads, or with ``step`` the teacher's plus that much of eight further directions.

    The further directions stand in columns of their own, so that a difference of any size survives the rounding of the inputs.
    """
    tokens, vocabulary, width, extra = 67, 4099, 61, 8
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = normal(tokens, width), normal(vocabulary, width) * spread / math.sqrt(width)
    if step is None:
        teacher_hidden, teacher_weight = normal(tokens, width - extra), normal(vocabulary, width - extra)
        teacher_weight = teacher_weight * spread / math.sqrt(width - extra)
    else:
        teacher_hidden, teacher_weight = hidden[:, :-extra], weight[:, :-extra]
        hidden = torch.cat([teacher_hidden, step * hidden[:, -extra:]], 1)
    hidden, weight, teacher_hidden, teacher_weight = (
        t.to(device, DTYPES[dtype]).contiguous() for t in (hidden, weight, teacher_hidden, teacher_weight)
    )
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight)


def oracle(inputs: Inputs) -> peers.Outputs:
    """The definition, in float64, of the same (rounded) inputs; it shares no code with any contender."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.student_hidden, inputs.student_weight))
    student, teacher = hidden @ weight.T, inputs.teacher_hidden.double() @ inputs.teacher_weight.double().T
    if inputs.softcap is not None:
        student, teacher = (inputs.softcap * torch.tanh(z / inputs.softcap) for z in (student, teacher))
    log_s, log_t = student - student.logsumexp(-1, keepdim=True), teacher - teacher.logsumexp(-1, keepdim=True)
    loss = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def errors(got: peers.Outputs, wanted: peers.Outputs) -> dict[str, float]:
    """Relative errors of the loss and, in L2, of both gradients."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() - b).norm() / b.norm())

    return dict(zip(("loss", "d_hidden", "d_weight"), map(relative, got, wanted), strict=True))


def verify(contender: Contender, dtype: str, softcap: float | None, device: str) -> dict[str, Any]:
    """Run ``contender`` on the small problem: its errors against the oracle and a verdict, same, rounded or different."""
    spread = max(2.0, (softcap or 0.0) / 3)  # of the logits: a softcap that nobody feels would verify nothing
    inputs = replace(small(dtype, device, seed=1, spread=spread), softcap=softcap if contender.softcap else None)
    if contender.name == "undo-core-workspace":
        inputs = replace(inputs, workspace_bytes=1 << 20)
    found = errors(contender.build(inputs)(), oracle(inputs))
    worst = max(found["d_hidden"], found["d_weight"])

    def within(bounds: tuple[float, float]) -> bool:
        return found["loss"] <= bounds[0] and worst <= bounds[1]  # false for NaN

    same, rounded = TOLERANCE[dtype]
    return found | {"verdict": "same" if within(same) else "rounded" if within(rounded) else "different"}


# -- one contender in one row --------------------------------------------------------------------------------------------------


def blank(contender: Contender, row: Row, device: str, workspace: int | None) -> dict[str, Any]:
    """What a row says of a contender before anything is measured: verified, or why it will not be timed."""
    record: dict[str, Any] = {"name": contender.name, "label": contender.label, "status": "ready", "notes": []}
    missing = contender.missing()
    if missing:
        return record | {"status": missing}
    if contender.name == "undo-core-workspace":
        if workspace is None:
            return record | {"status": "no measured memory of plain torch to take a tenth of"}
        record |= {"label": f"{contender.label} {harness.megabytes(workspace)}", "workspace_bytes": workspace}
    if contender.name.startswith("undo-core"):
        record["backend"] = peers.used_backend(device, DTYPES[row.dtype])
    if contender.note:
        record["notes"].append(contender.note)
    if row.softcap is not None and not contender.softcap:
        record["notes"].append("knows no softcap: ran without one")
    if not contender.is_loss:
        return record
    try:
        checked = verify(contender, row.dtype, row.softcap, device)
    except Exception as error:  # whatever a contender raises is the finding; its row says it
        return record | {"status": f"failed: {_first_line(error)}"}
    record["verification"] = checked
    if checked["verdict"] == "different":
        return record | {"status": "rejected: it computes something else"}
    if checked["verdict"] == "rounded":
        record["notes"].append(contender.differs or "less accurate than its dtype allows")
    elif row.dtype != "float32" and contender.differs:
        record["notes"].append(contender.differs)
    return record


def memory(record: dict[str, Any], row: Row, device: str, inputs: Inputs | None) -> dict[str, Any]:
    """Peak extra memory of one contender; on a GPU in this process, on a CPU in one of its own."""
    if device == "cuda":
        contender = CONTENDERS[record["name"]]
        step = contender.build(_for(record, inputs))
        step()
        if not contender.is_loss:  # its buffers are made when it is built, and count

            def step() -> peers.Outputs:
                return contender.build(inputs)()

        return harness.peak_extra_cuda(step, inputs.output_bytes)
    request = {"row": asdict(row), "contender": record["name"], "workspace_bytes": record.get("workspace_bytes")}
    return harness.in_fresh_process(Path(__file__), request, torch.get_num_threads())


def worker(request: dict[str, Any]) -> None:
    """The process of its own: measure one contender's memory on a CPU and print it as JSON."""
    row, contender = Row(**request["row"]), CONTENDERS[request["contender"]]
    inputs = replace(draw(row, "cpu"), workspace_bytes=request["workspace_bytes"])
    if contender.compiles:
        run = contender.build(inputs)
        measured = harness.peak_extra_cpu(run, run, inputs.output_bytes)
    else:
        warm_up = contender.build(small(row.dtype, "cpu", seed=1))
        measured = harness.peak_extra_cpu(warm_up, lambda: contender.build(inputs)(), inputs.output_bytes)
    print(json.dumps(measured))


def _for(record: dict[str, Any], inputs: Inputs) -> Inputs:
    return replace(inputs, workspace_bytes=record.get("workspace_bytes"))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def measure(row: Row, device: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Everything of one row. Memory first: the workspace of one contender is a tenth of what another was seen to take."""
    names = [name for name in row.contenders if options.contenders is None or name in options.contenders]
    if "undo-core-workspace" in names and "plain" in names:
        names = ["plain", *(name for name in names if name != "plain")]  # measured first, shown in the row's order
    inputs = draw(row, device) if device == "cuda" else None
    task = progress.add_task(row.id, total=len(names) * (2 + options.rounds))
    load = os.getloadavg()
    records: dict[str, dict[str, Any]] = {}
    workspace = None
    _forget_compiled(names)
    for name in names:
        progress.update(task, description=f"{row.id}: {CONTENDERS[name].label}: check, memory")
        record = records[name] = blank(CONTENDERS[name], row, device, workspace)
        if record["status"] == "ready" and not options.no_memory:
            try:
                record["memory"] = memory(record, row, device, inputs)
            except Exception as error:  # as above: out of memory is a finding
                record["status"] = f"failed: {_first_line(error)}"
        if name == "plain" and "memory" in record:
            workspace = record["memory"]["extra_bytes"] // 10
        _release(device)
        progress.advance(task)
    inputs = inputs or draw(row, device)
    steps: dict[str, Callable[[], Any]] = {}
    _forget_compiled(names)
    for name in names:
        record = records[name]
        progress.update(task, description=f"{row.id}: {CONTENDERS[name].label}: warm-up")
        if record["status"] == "ready":
            try:
                step = CONTENDERS[name].build(_for(record, inputs))
                record["first_s"] = harness.stopwatch(device)(step)
                step()
                steps[name] = step
            except Exception as error:  # as above
                record["status"] = f"failed: {_first_line(error)}"
            _release(device)
        progress.advance(task, 1 if name in steps else 1 + options.rounds)
    for name in steps:
        records[name] |= {"status": "measured", "samples_s": []}
    for name, taken in harness.interleave(steps, options.rounds, device):
        records[name]["samples_s"].append(taken)
        progress.update(task, advance=1, description=f"{row.id}: {CONTENDERS[name].label}: {taken:.3g} s")
    progress.remove_task(task)
    shown = [records[name] for name in row.contenders if name in records]
    loads = {"load_before": load, "load_after": os.getloadavg()}
    return asdict(row) | loads | {"rounds": options.rounds, "provenance": options.provenance(), "contenders": shown}


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _forget_compiled(names: Sequence[str]) -> None:
    """Before a phase that compiles: torch refuses to compile one function for more than a few shapes."""
    if any(CONTENDERS[name].compiles for name in names):
        torch.compiler.reset()


# -- gradient error against KL -------------------------------------------------------------------------------------------------


def at_divergence(target: float, dtype: str, device: str, seed: int) -> tuple[Inputs, peers.Outputs]:
    """A small problem whose true KL, of the rounded inputs, is ``target`` within 2 %, and its oracle."""
    step = math.sqrt(target)
    for _ in range(40):
        inputs = small(dtype, device, seed, step, spread=3.0)
        wanted = oracle(inputs)
        loss = float(wanted[0])
        if abs(loss / target - 1) < 0.02:
            return inputs, wanted
        step *= math.sqrt(target / loss)  # the divergence grows with the step squared, or more slowly
    raise RuntimeError(f"no step gives a KL of {target:g}; the last gave {loss:g}")


def error_section(device: str, options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Relative gradient errors as the true KL falls: undo-core in float32 and bfloat16, everybody else in bfloat16."""
    rows = QUICK[device] if options.quick else ROWS[device]
    names = [name for name in dict.fromkeys(n for row in rows for n in row.contenders) if CONTENDERS[name].is_loss]
    names = [name for name in names if name not in ("undo-core-workspace", "undo-core-lse", "undo-reference")]
    pairs = [("undo-core", "float32"), *((name, "bfloat16") for name in names)]
    pairs = [pair for pair in pairs if options.contenders is None or pair[0] in options.contenders]
    seeds = 1 if options.quick else ERROR_SEEDS
    problems = {
        (dtype, target, seed): at_divergence(target, dtype, device, seed)
        for dtype in dict.fromkeys(dtype for _, dtype in pairs)
        for target in ERROR_TARGETS
        for seed in range(seeds)
    }
    task = progress.add_task("gradient error against KL", total=len(pairs) * len(ERROR_TARGETS))
    curves = []
    for name, dtype in pairs:
        contender = CONTENDERS[name]
        _forget_compiled([name])
        curve: dict[str, Any] = {
            "name": name,
            "label": contender.label,
            "dtype": dtype,
            "status": contender.missing(),
            "points": [],
        }
        curves.append(curve)
        if name == "undo-core":
            curve["backend"] = peers.used_backend(device, DTYPES[dtype])
        for target in ERROR_TARGETS if curve["status"] is None else ():
            runs = []
            for seed in range(seeds):
                inputs, wanted = problems[dtype, target, seed]
                runs.append({"kl": float(wanted[0])} | errors(contender.build(inputs)(), wanted))
            curve["points"].append({"target_kl": target, "seeds": runs})
            progress.update(task, advance=1, description=f"gradient error: {contender.label}, KL {target:g}")
        curve["status"] = curve["status"] or "measured"
    progress.remove_task(task)
    return {"provenance": options.provenance(), "seeds": seeds, "curves": curves}


# -- what is shown -------------------------------------------------------------------------------------------------------------


def show(row: dict[str, Any]) -> None:
    """One row of the results as a table on the terminal."""
    softcap = "" if row["softcap"] is None else f", softcap {row['softcap']:g}"
    title = f"{row['id']}: {row['tokens']:,} tokens × {row['vocabulary']:,}, width {row['width']}, {row['dtype']}{softcap}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for heading in ("time", "× undo-core", "× products", "memory", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    said = []
    undo, products = harness.contender(row, "undo-core"), harness.contender(row, "products")
    for record in row["contenders"]:
        remarks = [] if record["status"] == "measured" else [record["status"]]
        remarks += [f"backend: {record['backend']}"] if "backend" in record else []
        table.add_row(
            record["label"],
            harness.seconds(harness.median(record)),
            harness.times(harness.ratio(record, undo)),
            harness.times(harness.ratio(record, products)),
            harness.megabytes(record.get("memory", {}).get("extra_bytes")),
            harness.percent(harness.gradient_error(record)),
        )
        if remarks + record["notes"]:
            said.append(f"{record['label']}: {'; '.join(remarks + record['notes'])}")
    console.print(table)
    console.print("memory: peak beyond inputs and gradients; error: of the gradients, against float64", style="dim")
    for line in said:
        console.print(line, style="dim", soft_wrap=True)
    console.print()


def show_errors(section: dict[str, Any]) -> None:
    """The errors of dH on the terminal, worst seed."""

    def short(value: float) -> str:
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")

    title = "relative error of dH in %, as the true KL falls"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    for target in ERROR_TARGETS:
        table.add_column(short(target), justify="right", no_wrap=True)
    for curve in section["curves"]:
        worst = [100 * max(run["d_hidden"] for run in point["seeds"]) for point in curve["points"]]
        label = f"{curve['label']}, {curve['dtype'].replace('float', 'f')}"
        table.add_row(label, *(map(short, worst) if worst else [curve["status"]]))
    console.print(table)
    console.print()


# -- the command ---------------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    known = [row.id for rows in (ROWS["cpu"], ROWS["cuda"]) for row in rows]
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""rows:        {", ".join([*known, ERROR])}
contenders:  {", ".join(CONTENDERS)}

examples:
  python bench/bench_kl.py                                   everything that this machine's file lacks
  python bench/bench_kl.py --only f32-256k error             these again
  python bench/bench_kl.py --quick                           tiny problems, to see that it works; to runs/bench/
  python bench/bench_kl.py --device cuda --rounds 20         on a GPU
  python bench/tables.py README.md bench/results/kl-cpu/MACHINE.json    then: the table in the README
  python bench/plot.py                                       and the pictures, of every recorded file

Close other programs first. Peers: pip install 'liger-kernel==0.8.5' 'trl==1.16.0'; one that is missing is a row that says so.""",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure these rows, also where the file has them")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only these contenders, in every row that is measured")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed rounds (default: 9, and 2 with --quick)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results (default: bench/results/kl-DEVICE/MACHINE.json)")
    parser.add_argument("--quick", action="store_true", help="tiny problems; their numbers mean nothing")
    parser.add_argument("--fresh", action="store_true", help="forget the file and measure every row")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurement of memory")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's threads (default: torch's own choice)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    rows = QUICK[options.device] if options.quick else ROWS[options.device]
    for flag, given, wanted in (
        ("--only", options.only, [*(row.id for row in rows), ERROR]),
        ("--contenders", options.contenders, list(CONTENDERS)),
    ):
        for name in given or ():
            if name not in wanted:
                parser.error(f"{flag}: got {name!r}, wanted some of {', '.join(wanted)}")
    options.rounds = options.rounds if options.rounds is not None else 2 if options.quick else 9
    for flag, value in (("--rounds", options.rounds), ("--threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"{flag}: got {value}, wanted an integer >= 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', but torch sees no GPU here")
    if options.device == "cpu" and not options.no_memory and not sys.platform.startswith("linux"):
        parser.error("memory is measured through Linux's /proc; add --no-memory")
    return options


def load(path: Path, suite: str, options: argparse.Namespace) -> dict[str, Any]:
    """The results that are there, or an empty record."""
    empty = {"format": FORMAT, "suite": suite, "machine": harness.machine(options.device), "rows": [], "error_versus_kl": None}
    if options.fresh or not path.exists():
        return empty
    found = json.loads(path.read_text())
    if found.get("format") != FORMAT or found.get("suite") != suite:
        raise SystemExit(
            f"{path}: got format {found.get('format')} of {found.get('suite')}, wanted {FORMAT} of {suite}; try --fresh"
        )
    return found | {"machine": empty["machine"]}


def same_problem(found: dict[str, Any], row: Row) -> bool:
    return all(found.get(key) == value for key, value in json.loads(json.dumps(asdict(row))).items() if key != "contenders")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        worker(json.loads(options.worker))
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    if options.out and "--out" in given:  # where the file lies has no part in what was measured
        at = given.index("--out")
        given = given[:at] + given[at + 2 :]
    options.provenance = lambda: harness.provenance("bench/bench_kl.py", given)
    suite = f"kl-{options.device}" + ("-quick" if options.quick else "")
    default = harness.ROOT / ("runs/bench" if options.quick else "bench/results") / suite
    path = options.out or default / f"{harness.machine(options.device)['name']}.json"
    results = load(path, suite, options)
    rows = QUICK[options.device] if options.quick else ROWS[options.device]
    there = {found["id"]: found for found in results["rows"]}
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        for row in rows:
            kept = row.id in there and same_problem(there[row.id], row)
            if (row.id not in options.only) if options.only else kept:
                continue
            there[row.id] = measure(row, options.device, options, progress)
            results["rows"] = [there[r.id] for r in rows if r.id in there]
            harness.write_json(path, results)
            show(there[row.id])
        if (ERROR in options.only) if options.only else results["error_versus_kl"] is None:
            results["error_versus_kl"] = error_section(options.device, options, progress)
            harness.write_json(path, results)
            show_errors(results["error_versus_kl"])
    console.print(f"results: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
