"""A row of the vocabulary benchmarks, measured: verification, memory, ceilings, and interleaved rounds of time in both modes.

Every contender is first checked against a float64 oracle on a small problem; one that computes something else is not timed.
Then: what the machine can do, peak extra memory (a fresh process each on a CPU), and interleaved rounds of time, of the forward pass
alone and with the gradients.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import activations
import ceilings
import harness
import torch
import undo_kernels
from contenders import Contender, used_backend
from problems import DEFAULT, DTYPES, Inputs, Outputs, Row, draw, errors, small, verdict
from rich.progress import Progress

LEAST, MOST, ROW_SECONDS = 3, 9, 15.0  # rounds of a row by default, as many as fit
ORACLE_ELEMENTS = 1 << 23  # (token, vocabulary row) pairs that a float64 oracle is asked for

Section = Callable[[str, argparse.Namespace, Progress], Any]


@dataclass(frozen=True)
class Suite:
    """A loss and everything that computes it.

    Attributes:
        name: of the results: ``NAME-DEVICE``.
        script: path of the command from the repository's root.
        contenders: by name.
        oracle: the float64 definition.
        teacher: whether there is one.
        rows: by device.
        quick: tiny rows, by device.
        sections: further measurements, by their names on the command line and their keys in the results.
        shows: how each is shown on the terminal.
    """

    name: str
    script: str
    contenders: Mapping[str, Contender]
    oracle: Callable[[Inputs], Outputs]
    teacher: bool
    rows: Mapping[str, Sequence[Row]]
    quick: Mapping[str, Sequence[Row]]
    sections: Mapping[str, tuple[str, Section]]
    shows: Mapping[str, Callable[[Any], None]]

    def verify(self, contender: Contender, dtype: str, softcap: float | None, device: str) -> dict[str, Any]:
        """Run ``contender`` on the small problem: its errors against the oracle and a verdict, same, rounded or different."""
        spread = max(2.0, (softcap or 0.0) / 3)  # of the logits: a softcap that nobody feels would verify nothing
        inputs = replace(small(dtype, device, seed=1, spread=spread), softcap=softcap if contender.softcap else None)
        if contender.name == "undo-core-workspace":
            inputs = replace(inputs, workspace_bytes=1 << 20)
        found = errors(contender.step(inputs)(), self.oracle(inputs))
        # The loss without gradients is often another path: it must be the same number.
        alone = float(contender.step(inputs, "forward")()[0])
        wanted = float(self.oracle(inputs)[0])
        found["loss"] = max(found["loss"], abs(alone / wanted - 1))
        return found | {"verdict": verdict(found, dtype)}

    def blank(self, contender: Contender, row: Row, device: str, workspace: int | None) -> dict[str, Any]:
        """What a row says of a contender before anything is measured: verified, or why it will not be timed."""
        record: dict[str, Any] = {"name": contender.name, "label": contender.label, "status": "ready", "notes": []}
        missing = contender.missing(device)
        if missing:
            return record | {"status": missing}
        if contender.name == "undo-core-workspace":
            if workspace is None:
                return record | {"status": "no measured memory of plain torch to take a tenth of"}
            record |= {"label": f"{contender.label} {harness.megabytes(workspace)}", "workspace_bytes": workspace}
        if contender.name.startswith("undo-core"):
            record["backend"] = used_backend(device, DTYPES[row.dtype])
        if contender.note:
            record["notes"].append(contender.note)
        if row.softcap is not None and not contender.softcap:
            record["notes"].append("knows no softcap: ran without one")
        if not contender.is_loss:
            return record
        try:
            checked = self.verify(contender, row.dtype, row.softcap, device)
        except Exception as error:  # whatever a contender raises is the finding; its row says it
            return record | {"status": f"failed: {first_line(error)}"}
        record["verification"] = checked
        if checked["verdict"] == "different":
            return record | {"status": "rejected: it computes something else"}
        if checked["verdict"] == "rounded":
            record["notes"].append(contender.differs or "less accurate than its dtype allows")
        elif row.dtype != "float32" and contender.differs:
            record["notes"].append(contender.differs)
        return record

    def drawn(self, row: Row, device: str, file: Path | None) -> Inputs:
        """The row's inputs: random ones, or those captured in ``file``."""
        if file is None:
            return draw(row, device, self.teacher)
        return replace(activations.load(file).to(DTYPES[row.dtype], device), softcap=row.softcap)


# -- one contender in one row --------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def problem_of(contender: Contender, record: Mapping[str, Any], inputs: Inputs) -> Inputs:
    inputs = replace(inputs, workspace_bytes=record.get("workspace_bytes"))
    return inputs if contender.softcap else inputs.without_softcap()


def memory(
    suite: Suite, record: dict[str, Any], row: Row, device: str, inputs: Inputs | None, file: Path | None
) -> dict[str, Any]:
    """Peak extra memory of one contender, by mode; on a GPU in this process, on a CPU in one of its own."""
    contender = suite.contenders[record["name"]]
    if device == "cpu":
        request = {
            "row": asdict(row),
            "contender": contender.name,
            "workspace_bytes": record.get("workspace_bytes"),
            "file": None if file is None else str(file),
        }
        return harness.in_fresh_process(harness.ROOT / suite.script, request, torch.get_num_threads())
    found, inputs = {}, problem_of(contender, record, inputs)
    for mode in harness.SAMPLES:
        step = contender.step(inputs, mode)
        step()
        if not contender.is_loss:  # its buffers are made when it is built, and count

            def step(mode: str = mode) -> Outputs:
                return contender.step(inputs, mode)()

        found[mode] = harness.peak_extra_cuda(step, inputs.output_bytes if mode == "both" else 0)
    return found


def worker(suite: Suite, request: dict[str, Any]) -> None:
    """The process of its own: measure one contender's memory on a CPU and print it as JSON.

    Both passes first: nothing that the forward pass alone would keep can stand in ``resident_before``.
    """
    row, contender = Row(**request["row"]), suite.contenders[request["contender"]]
    inputs = suite.drawn(row, "cpu", request["file"] and Path(request["file"]))
    inputs = problem_of(contender, request, inputs)
    found = {}
    for mode in harness.SAMPLES:
        outputs = inputs.output_bytes if mode == "both" else 0
        if contender.compiles:
            run = warm_up = contender.step(inputs, mode)
        else:
            warm_up = contender.step(small(row.dtype, "cpu", seed=1), mode)

            def run(mode: str = mode) -> Outputs:
                return contender.step(inputs, mode)()

        found[mode] = harness.peak_extra_cpu(warm_up, run, outputs)
        undo_kernels.release_workspace()
    print(json.dumps(found))


# -- a row ---------------------------------------------------------------------------------------------------------------------


def measure(
    suite: Suite, row: Row, options: argparse.Namespace, progress: Progress, file: Path | None = None
) -> dict[str, Any]:
    """Everything of one row. Memory first: the workspace of one contender is a tenth of what another was seen to take."""
    device = options.device
    names = [name for name in row.contenders if options.contenders is None or name in options.contenders]
    if "undo-core-workspace" in names and "plain" in names:
        names = ["plain", *(name for name in names if name != "plain")]  # measured first, shown in the row's order
    task = progress.add_task(row.id, total=len(names) * (2 + options.rounds))
    load = os.getloadavg()
    limits = ceilings.measure(device, DTYPES[row.dtype], options.quick)
    inputs = suite.drawn(row, device, file) if device == "cuda" else None
    records: dict[str, dict[str, Any]] = {}
    workspace = None
    forget_compiled(suite, names)
    for name in names:
        progress.update(task, description=f"{row.id}: {suite.contenders[name].label}: check, memory")
        record = records[name] = suite.blank(suite.contenders[name], row, device, workspace)
        if record["status"] == "ready" and not options.no_memory:
            try:
                both = memory(suite, record, row, device, inputs, file)
                record |= {"memory": both["both"], "forward_memory": both["forward"]}
            except Exception as error:  # as above: out of memory is a finding
                record["status"] = f"failed: {first_line(error)}"
        if name == "plain" and "memory" in record:
            workspace = record["memory"]["extra_bytes"] // 10
        _release(device)
        progress.advance(task)
    inputs = inputs or suite.drawn(row, device, file)
    wanted = None
    if file is not None:
        part = inputs.first(max(1, ORACLE_ELEMENTS // row.vocabulary))
        wanted = suite.oracle(part)
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    forget_compiled(suite, names)
    for name in names:
        record, contender = records[name], suite.contenders[name]
        progress.update(task, description=f"{row.id}: {contender.label}: warm-up")
        if record["status"] == "ready":
            try:
                if wanted is not None and contender.is_loss:
                    same = contender.softcap or row.softcap is None  # else it solved another problem than the oracle
                    got = contender.step(problem_of(contender, record, part))() if same else None
                    record["captured"] = errors(got, wanted) if same else None
                own = {mode: contender.step(problem_of(contender, record, inputs), mode) for mode in harness.SAMPLES}
                record["first_s"] = harness.stopwatch(device)(own["both"])
                for step in own.values():
                    step()
                steps |= {(name, mode): step for mode, step in own.items()}
            except Exception as error:  # as above
                record["status"] = f"failed: {first_line(error)}"
            _release(device)
        progress.advance(task)
    for name, _ in steps:
        records[name] |= {"status": "measured"} | {key: [] for key in harness.SAMPLES.values()}
    for (name, mode), taken in harness.interleave(steps, options.rounds, device, options.least, ROW_SECONDS):
        records[name][harness.SAMPLES[mode]].append(taken)
        progress.update(task, advance=0.5, description=f"{row.id}: {suite.contenders[name].label}: {taken:.3g} s")
    progress.remove_task(task)
    size = DTYPES[row.dtype].itemsize
    result = asdict(row) | {"load_before": load, "load_after": os.getloadavg(), "ceilings": limits}
    if wanted is not None:
        result["captured_loss"] = float(wanted[0])
    result["owed"] = ceilings.owed(row.tokens, row.vocabulary, row.width, size, 1 + suite.teacher)
    result["rounds"] = max((len(record.get("samples_s", ())) for record in records.values()), default=0)
    return result | {
        "provenance": options.provenance(),
        "contenders": [records[name] for name in row.contenders if name in records],
    }


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def forget_compiled(suite: Suite, names: Sequence[str]) -> None:
    """Before a phase that compiles: torch refuses to compile one function for more than a few shapes."""
    if any(suite.contenders[name].compiles for name in names):
        torch.compiler.reset()


# -- the same steps under pytest-benchmark -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One contender in one row, in one mode."""

    row: Row
    device: str
    contender: str
    mode: str


def parametrize(metafunc: Any, suite: Suite) -> None:
    """Every contender of the default and of the quick rows, in both modes; ``-k`` chooses among them."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    cases = [
        Case(row, device, name, mode)
        for device in devices
        for row in (*suite.rows[device], *suite.quick[device])
        if row.group == DEFAULT
        for mode in harness.SAMPLES
        for name in row.contenders
    ]
    names = [f"{suite.name}-{case.device}-{case.row.id}-{case.mode}-{case.contender}" for case in cases]
    metafunc.parametrize("case", cases, ids=names)


def run_case(benchmark: Any, suite: Suite, case: Case) -> None:
    """The contender, verified and then timed; a group of pytest-benchmark's table is one row in one mode.

    One after the other, not interleaved: for ratios between contenders the scripts' own tables are the ones to trust.
    """
    import pytest

    record = suite.blank(suite.contenders[case.contender], case.row, case.device, None)
    if record["status"] != "ready":
        pytest.skip(record["status"])
    contender = suite.contenders[case.contender]
    step = contender.step(problem_of(contender, record, suite.drawn(case.row, case.device, None)), case.mode)

    def run() -> None:
        step()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{suite.name} {case.row.id} {case.mode}"
    benchmark.extra_info |= {"verification": record.get("verification"), "notes": record["notes"]}
    benchmark.pedantic(run, rounds=LEAST, warmup_rounds=1)
    forget_compiled(suite, [case.contender])
