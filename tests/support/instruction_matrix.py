"""The table of ``tests/matrix.py``: its cells, its rows, each in a process of its own, and what fails."""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import arm_program as arm
import harness
import near_agreement as near
import torch
from noise_answers import KNOWN, digests
from summaries import markdown
from vocab_losses import computed_in, divergence, logits

SCRIPT = Path(__file__).resolve().parents[1] / "matrix.py"
TORCH = "torch alone"
VECTORS = ("avx512", "avx2", "plain")
PRODUCTS = {"amx": "avx512", "avx512bf16": "avx512", "avx512bf16-emulated": "avx512"}  # of bfloat16, with their vector units
DTYPES = ("float32", "bfloat16", "float16")
SPREADS = (1.0, 3.0)
TORCH_SCALE = 2.0**15  # the largest power of two in float16; undo-core's gradients stand the whole of near.LOSS_SCALE
WRITES = (
    "`python tests/matrix.py --out docs/results/instruction-sets.md` writes the section of a processor; `--path FOLDERS` adds rows with "
    "the torch that lies in those folders."
)
SAID = (
    "Largest relative errors of the gradients · of the loss, and whether the noise has its known bits (`same`). The gradients may err by "
    "1 % in 16 bits, and in float32 by 0.01 % down to a KL of 0.001 and 0.3 % below; the loss by 0.1 %. *Torch alone* computes the "
    "formula in the same dtype, without a kernel; *plain* are the kernels without vector instructions. Rows of the emulator have the "
    "errors of the row kernels on given logits and, in bfloat16, of the product."
)


def _worse(old: float | None, new: float) -> float:
    """Returns the larger error; a NaN stays."""
    return new if old is None or not (math.isnan(old) or new <= old) else old


@dataclass
class Cell:
    """What was measured with one instruction set, dtype and number of threads.

    Attributes:
        gradient: largest relative error of a gradient; None if it was not measured.
        loss: the same of a loss.
        noise: whether the noise has its known bits; None if there is none.
        failures: a line for each case that fails.
    """

    gradient: float | None = None
    loss: float | None = None
    noise: bool | None = None
    failures: list[str] = field(default_factory=list)

    def judge(self, case: str, dtype: str, kl: float, loss: float, gradient: float) -> None:
        """Adds a case of the losses; anything that is not within its limit fails, NaN too."""
        self.gradient, self.loss = _worse(self.gradient, gradient), _worse(self.loss, loss)
        for what, got, limit in (
            ("gradient", gradient, near.gradient_limit(getattr(torch, dtype), kl)),
            ("loss", loss, near.LOSS_LIMIT),
        ):
            if not got <= limit:
                self.failures.append(f"{case}, KL {kl:.1e}: error of the {what} {got:.2g}, wanted at most {limit:g}")

    def compare(self, found: dict[str, str]) -> None:
        """Adds the digests of the noise."""
        wrong = [name for name, bits in found.items() if KNOWN[name] != bits]
        self.noise = bool(found) and not wrong
        self.failures += [f"noise {name}: got bits {found[name]}, wanted {KNOWN[name]}" for name in wrong]
        self.failures += [] if found else ["noise: got nothing, wanted the known bits"]

    def shown(self) -> str:
        """Returns the cell's text."""
        parts = [harness.percent(error) for error in (self.gradient, self.loss) if error is not None]
        parts += [] if self.noise is None else ["same" if self.noise else "OTHER BITS"]
        return ("**FAILED** " if self.failures else "") + (" · ".join(parts) or "–")


@dataclass
class Line:
    """A row of the table: cells by dtype and threads, as in ``bfloat16, 2``, or why there are none."""

    title: str
    cells: dict[str, Cell] = field(default_factory=dict)
    absent: str = ""


# -- one instruction set, in a process of its own ---------------------------------------------------------------------------------


@functools.cache
def problems(spread: float, kind: str, dtype: str) -> list[near.Near]:
    return near.approach(*near.random_teacher(spread), kind, getattr(torch, dtype))


def cases(dtype: str) -> Iterator[tuple[float, str, near.Near]]:
    for spread in SPREADS:
        for kind in near.KINDS:
            for problem in problems(spread, kind, dtype):
                yield spread, kind, problem


def by_torch(dtype: str) -> Cell:
    """Measures the formula in the same dtype; it has no limit to keep."""
    cell = Cell()
    for _, kind, problem in cases(dtype):

        def loss(h: torch.Tensor, w: torch.Tensor, kind: str = kind, problem: near.Near = problem) -> torch.Tensor:
            z_s, z_t = (
                logits(hidden, weight, softcap=near.SOFTCAP) for hidden, weight in ((h, w), (problem.teacher, problem.weight))
            )
            return divergence(z_s, z_t, kind).mean()

        with computed_in(getattr(torch, dtype)):
            cell.judge("", dtype, problem.kl, *problem.errors(loss, TORCH_SCALE)[:2])
    cell.failures.clear()
    return cell


def by_kernels(name: str, dtype: str) -> Cell:
    """Measures the C++ kernels with the instruction set that ``UNDO_CPU_ISA`` names."""
    from undo_kernels import cpu, ops, recorded

    cpu.plan._BLOCK_V = 1024  # several tiles, as in a large problem
    cell, vectors = Cell(), PRODUCTS.get(name, name)
    wanted = f"cpu {vectors}+{name}" if name in PRODUCTS and dtype == "bfloat16" else f"cpu {vectors}"
    with recorded() as calls:
        for spread, kind, problem in cases(dtype):
            for plan in ("chunk", "recompute"):
                options = {"divergence": kind, "plan": plan, "student_softcap": near.SOFTCAP, "teacher_softcap": near.SOFTCAP}
                teacher = problem.teacher, problem.weight
                found = problem.errors(lambda h, w, t=teacher, o=options: ops.linear_kl_div(h, w, *t, **o))
                cell.judge(f"{kind}, {plan}, standard deviation {spread:g}", dtype, problem.kl, *found)
    with recorded() as noised:
        cell.compare(digests(getattr(torch, dtype), cpu.noise.noise_))
    for what, ran, form in (("losses", calls, wanted), ("noise", noised, f"cpu {vectors}")):
        others = {f"{call.backend} {call.form}" for call in ran} ^ {form}
        if others:
            cell.failures.append(f"{what}: {', '.join(sorted(others))} ran or did not, wanted {form} alone")
    return cell


def worker(name: str, threads: Sequence[int]) -> None:
    """Prints the cells of one row as JSON."""
    found = {}
    for dtype in DTYPES:
        for count in threads:
            torch.set_num_threads(count)
            found[f"{dtype}, {count}"] = asdict(by_torch(dtype) if name == TORCH else by_kernels(name, dtype))
    print(json.dumps({"torch": torch.__version__, "cells": found}))


# -- the rows ---------------------------------------------------------------------------------------------------------------------


def environment_rows(command: Sequence[str], path: str, threads: Sequence[int]) -> Iterator[Line]:
    """Yields the rows of one interpreter, with what its processor has not."""
    environment = {key: value for key, value in os.environ.items() if key != "UNDO_CPU_ISA"}
    environment |= {"PYTHONPATH": path} if path else {}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin would hold up each other on a busy machine
    ask = "from undo_kernels import cpu; print(*cpu.instruction_sets(), *cpu.emulations())"
    here = subprocess.run([*command, "-W", "ignore", "-c", ask], env=environment, capture_output=True, text=True)
    if here.returncode:
        said = here.stderr.strip().splitlines() or [f"exit status {here.returncode}"]
        raise SystemExit(f"{shlex.join(command)}: cannot import undo_kernels: {said[-1]}")
    for name in (TORCH, *VECTORS, *PRODUCTS):
        if name != TORCH and name not in here.stdout.split():
            yield Line(name, absent=f"not at hand: this processor has {', '.join(here.stdout.split())}")
            continue
        chosen = environment if name == TORCH else environment | {"UNDO_CPU_ISA": name}
        request = [*command, "-W", "ignore", str(SCRIPT), "--worker", name, "--threads", *map(str, threads)]
        done = subprocess.run(request, env=chosen, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            yield Line(name, {f"{dtype}, {count}": Cell(failures=[said]) for dtype in DTYPES for count in threads})
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        cells = {key: Cell(**value) for key, value in found["cells"].items()}
        yield Line(f"{name}, {found['torch']}" if name == TORCH else f"{name}, torch {found['torch']}", cells)


def arm_cells(output: str, passed: bool, threads: int, products: Sequence[str]) -> dict[str, Cell]:
    """Returns the cells that the lines of ``tests/cpp/kernels.cpp`` give; ``products``: the bfloat16 products that have to be there."""
    lines = dict(re.findall(r"^((?:noise .*|product \w+|loss \w+)) (\S+(?: gradient \S+)?)$", output, re.MULTILINE))
    cells = {}
    for dtype in DTYPES:
        cell = cells[f"{dtype}, {threads}"] = Cell()
        if dtype == "float32" and "loss neon" in lines:
            loss, _, gradient = lines["loss neon"].split()
            cell.loss, cell.gradient = float(loss), float(gradient)
        elif dtype == "float32":
            cell.failures.append("losses: neon did not run")
        if dtype == "bfloat16":
            ran = [name for name in ("bfmmla",) if f"product {name}" in lines]
            cell.gradient = float(lines[f"product {ran[0]}"]) if ran else None
            cell.failures += [] if ran == list(products) else [f"product: {ran} ran, wanted {list(products)}"]
        cell.compare({key[6:]: bits for key, bits in lines.items() if re.match(rf"noise \w+ {dtype}\b", key)})
        cell.failures += [] if passed else ["tests/cpp/kernels.cpp failed: python tests/arm.py names the check"]
    return cells


def arm_rows(threads: Sequence[int]) -> Iterator[Line]:
    """Yields a row for each Arm processor of the emulator."""
    missing = arm.missing()
    with tempfile.TemporaryDirectory() as folder:
        program = None if missing else arm.build(arm.CROSS, Path(folder) / "arm", "-static")
        for name, what in arm.PROCESSORS.items():
            line = Line(f"neon, emulated: {what}", absent=missing)
            for count in () if program is None else threads:
                command = [arm.QEMU, "-cpu", name, program]
                done = subprocess.run(
                    command, env=os.environ | {"OMP_NUM_THREADS": str(count)}, capture_output=True, text=True, check=False
                )
                line.cells |= arm_cells(done.stdout, done.returncode == 0, count, arm.PRODUCTS[name])
            yield line


# -- the table --------------------------------------------------------------------------------------------------------------------


def table(lines: Sequence[Line], threads: Sequence[int]) -> str:
    """Returns the rows as Markdown."""
    columns = [(dtype, count) for dtype in DTYPES for count in threads]
    header = ["instruction set", *(f"{dtype}, {count} thread{'s' * (count > 1)}" for dtype, count in columns)]
    rows = []
    for line in lines:
        cells = [line.cells[f"{dtype}, {count}"].shown() if line.cells else "–" for dtype, count in columns]
        rows.append([line.title, *([line.absent, *cells[1:]] if line.absent else cells)])
    return markdown(header, rows)


def failures(lines: Sequence[Line]) -> list[str]:
    """Returns a line for each failing case: row, column, case."""
    return [f"{line.title}; {at}: {case}" for line in lines for at, cell in line.cells.items() for case in cell.failures]


def write(page: Path, facts: dict, text: str) -> None:
    """Replaces the processor's section of a page, or adds it, below the introduction of this version."""
    title, head = f"## {harness.whereabouts(facts)}", f"# Instruction sets, dtypes and threads\n\n{SAID}\n\n{WRITES}\n\n"
    _, *sections = re.split(r"(?=^## )", page.read_text() if page.exists() else "", flags=re.MULTILINE)
    kept = [section for section in sections if section.partition("\n")[0] != title]
    page.write_text("".join([head, *kept, f"{title}\n\n{text}\n"]))


def main(description: str, arguments: Sequence[str]) -> int:
    """Prints the table and the failing cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="COMMAND", help="also with this interpreter")
    parser.add_argument("--path", action="append", default=[], metavar="FOLDERS", help="also with this PYTHONPATH")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="also writes the table as this processor's section of a page")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, 2, len(os.sched_getaffinity(0))}), help="1, 2, all"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(options.worker, options.threads)
        return 0
    lines: list[Line] = []
    own = [sys.executable]
    for command, path in [
        (own, ""),
        *((shlex.split(one), "") for one in options.python),
        *((own, one) for one in options.path),
    ]:
        for line in environment_rows(command, path, options.threads):
            if line not in lines:  # what the processor has not is said once
                lines.append(line)
    lines += arm_rows(options.threads)
    facts, failed = harness.machine("cpu"), failures(lines)
    print(f"{harness.whereabouts(facts)}\n\n{table(lines, options.threads)}\n\n{SAID}")
    print("\n".join(["", *failed]) if failed else "\nEvery cell passed.", flush=True)
    if options.out:
        write(options.out, facts, table(lines, options.threads))
    return 1 if failed else 0
