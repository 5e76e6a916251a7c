"""Measures a row of the vocabulary benchmarks: memory, ceilings, verification, and interleaved rounds of time in both modes.

The order is: what the machine can do; peak extra memory (on a CPU in a fresh process each); verification; interleaved rounds of
time, of the forward pass alone and with the gradients. The verified step is the timed one, compiled or not, on the row's own
inputs, against a float64 oracle. A contender that computes something else is not timed. Errors and times are each recorded with
what undo-core ran (backend, plan and form, as reported by its kernels); if the two differ, only that difference is recorded.
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

import ceilings
import harness
import torch
import undo_kernels
from contenders import Contender, note_ran, observed, summarised, watched
from problems import DEFAULT, DTYPES, Inputs, Outputs, Row, draw, errors, verdict
from rich.progress import Progress

LESS_ACCURATE = "less accurate than its dtype allows"
LEAST, MOST, ROW_SECONDS = 3, 9, 15.0  # default rounds of a row, as many as fit
WARM_UP_TOKENS = 128  # tokens of the row for the warm-up in the process that measures memory: enough for the kernels to run

Section = Callable[[str, argparse.Namespace, Progress], Any]


@dataclass(frozen=True)
class Suite:
    """A benchmarked loss and its contenders.

    Attributes:
        name: name of the suite; its results are in ``NAME-DEVICE``.
        script: path of the command, relative to the repository's root.
        contenders: contenders by name.
        oracle: the loss by its definition in float64.
        teacher: whether the loss has a teacher.
        rows: rows by device.
        quick: tiny rows by device.
        sections: further measurements, by their names on the command line and their keys in the results.
        shows: functions that print each section.
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

    def verify(self, contender: Contender, inputs: Inputs, dtype: str) -> dict[str, Any]:
        """Runs :func:`verify` on a contender's steps with ``inputs``."""
        steps = {mode: contender.step(inputs, mode) for mode in harness.SAMPLES}
        return verify(contender, steps, self.oracle(inputs), dtype)

    def blank(self, contender: Contender, row: Row, device: str, workspace: int | None) -> dict[str, Any]:
        """Returns a contender's record before anything is measured: ready, or why it will not be measured."""
        record: dict[str, Any] = {"name": contender.name, "label": contender.label, "status": "ready", "notes": []}
        missing = contender.missing(device)
        if missing:
            return record | {"status": missing}
        if contender.name == "undo-core-workspace":
            if workspace is None:
                return record | {"status": "no measured memory of plain torch to take a tenth of"}
            record |= {"label": f"{contender.label} {harness.megabytes(workspace)}", "workspace_bytes": workspace}
        if contender.note:
            record["notes"].append(contender.note)
        if row.softcap is not None and not contender.softcap:
            record["notes"].append("knows no softcap: ran without one")
        return record

    def drawn(self, row: Row, device: str, file: Path | None) -> Inputs:
        """Returns the row's inputs: random ones, or those captured in ``file``."""
        if file is None:
            return draw(row, device, self.teacher)
        import activations  # imports transformers, which a worker with random inputs does not need

        return replace(activations.load(file).to(DTYPES[row.dtype], device), softcap=row.softcap)


# -- verification --------------------------------------------------------------------------------------------------------------


def verify(contender: Contender, steps: Mapping[str, Callable[[], Outputs]], wanted: Outputs, dtype: str) -> dict[str, Any]:
    """Runs a contender's steps of both modes; returns errors against the oracle, what ran, and same, rounded or different.

    Raises:
        RuntimeError: undo-core ran another backend than the contender is named after.
    """
    got, both = observed(steps["both"])
    found = errors(got, wanted)
    del got
    alone, forward = observed(steps["forward"])
    # The loss without gradients often takes another path; it must be the same number.
    found["loss"] = max(found["loss"], abs(float(alone[0]) / float(wanted[0]) - 1))
    ran = {"both": both, "forward": forward}
    used = {call["backend"] for calls in ran.values() for call in calls}
    if contender.backend is not None and used != {contender.backend}:
        raise RuntimeError(f"{contender.name}: ran on {', '.join(sorted(used)) or 'nothing'}, wanted {contender.backend}")
    return found | {"verdict": verdict(found, dtype), "ran": ran}


def judged(record: dict[str, Any], contender: Contender, checked: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns the record with a verification and the consequences of its verdict."""
    notes = [note for note in record["notes"] if note not in (contender.differs, LESS_ACCURATE)]
    record = record | {"verification": checked, "notes": notes}
    if checked["verdict"] == "different":
        return record | {"status": "rejected: it computes something else"}
    if checked["verdict"] == "rounded":
        record["notes"].append(contender.differs or LESS_ACCURATE)
    elif dtype != "float32" and contender.differs:
        record["notes"].append(contender.differs)
    return record


class Oracles:
    """A row's oracle, and the oracle for contenders without softcaps; each is computed on first use."""

    def __init__(self, suite: Suite, inputs: Inputs) -> None:
        self.suite, self.inputs = suite, inputs
        self.known: dict[float | None, Outputs] = {}

    def of(self, contender: Contender) -> Outputs:
        inputs = self.inputs if contender.softcap else self.inputs.without_softcap()
        if inputs.softcap not in self.known:
            self.known[inputs.softcap] = self.suite.oracle(inputs)
        return self.known[inputs.softcap]


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
    """Returns one contender's peak extra memory by mode, measured in this process on a GPU, in a separate one on a CPU."""
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
        if not contender.is_loss:  # buffers are made by build and count too

            def step(mode: str = mode) -> Outputs:
                return contender.step(inputs, mode)()

        outputs = inputs.output_bytes if mode == "both" else 0
        found[mode] = watched(lambda step=step, outputs=outputs: harness.peak_extra_cuda(step, outputs))
    return found


def worker(suite: Suite, request: dict[str, Any]) -> None:
    """Runs in a separate process: measures one contender's memory on a CPU and prints it as JSON.

    It measures both passes first, so that ``resident_before`` holds nothing that the forward pass alone would keep.
    """
    row, contender = Row(**request["row"]), suite.contenders[request["contender"]]
    inputs = suite.drawn(row, "cpu", request["file"] and Path(request["file"]))
    inputs = problem_of(contender, request, inputs)
    found = {}
    for mode in harness.SAMPLES:
        outputs = inputs.output_bytes if mode == "both" else 0
        own = contender.step(inputs, mode)
        warm_up = own if contender.compiles else contender.step(inputs.part(slice(WARM_UP_TOKENS)), mode)
        if not contender.is_loss:  # buffers are made by build and count too
            del own

            def own(mode: str = mode) -> Outputs:
                return contender.step(inputs, mode)()

        warm_up()
        undo_kernels.release_workspace()  # a workspace that is kept counts like one that is allocated
        found[mode] = watched(lambda own=own, outputs=outputs: harness.peak_extra_cpu(lambda: None, own, outputs))
        undo_kernels.release_workspace()
    print(json.dumps(found))


# -- a row ---------------------------------------------------------------------------------------------------------------------


def measure(
    suite: Suite,
    row: Row,
    options: argparse.Namespace,
    progress: Progress,
    file: Path | None = None,
) -> dict[str, Any]:
    """Measures one row. Memory comes first: one contender's workspace is a tenth of what another was measured to take."""
    device = options.device
    names = _names(suite, row, options)
    task = progress.add_task(row.id, total=len(names) * (2 + options.rounds))
    load = os.getloadavg()
    limits = ceilings.measure(device, DTYPES[row.dtype], options.quick)
    inputs = suite.drawn(row, device, file) if device == "cuda" else None
    records: dict[str, dict[str, Any]] = {}
    workspace = None
    forget_compiled(suite, names)
    for name in names:
        progress.update(task, description=f"{row.id}: {suite.contenders[name].label}: memory")
        record = records[name] = suite.blank(suite.contenders[name], row, device, workspace)
        if record["status"] == "ready" and not options.no_memory:
            try:
                both = memory(suite, record, row, device, inputs, file)
                record |= {"memory": both["both"], "forward_memory": both["forward"]}
            except Exception as error:  # out of memory is a result, like any other error of a contender: it is recorded
                record["status"] = f"failed: {first_line(error)}"
        if name == "plain" and "memory" in record:
            workspace = record["memory"]["extra_bytes"] // 10
        _release(device)
        progress.advance(task)
    inputs = inputs or suite.drawn(row, device, file)
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    true_loss = _verify_all(suite, row, records, names, inputs, device, progress, task, steps)
    for name, _ in steps:
        records[name] |= {"status": "measured", "ran": {}} | {key: [] for key in harness.SAMPLES.values()}
    with undo_kernels.recorded() as calls:
        for (name, mode), taken in harness.interleave(steps, options.rounds, device, options.least, ROW_SECONDS):
            records[name][harness.SAMPLES[mode]].append(taken)
            note_ran(records[name], mode, summarised(calls))
            calls.clear()
            progress.update(task, advance=0.5, description=f"{row.id}: {suite.contenders[name].label}: {taken:.3g} s")
    progress.remove_task(task)
    for name in {name for name, _ in steps}:
        harness.same_path(records[name], f"{row.id}: {name}")
    size = DTYPES[row.dtype].itemsize
    result = asdict(row) | {"load_before": load, "load_after": os.getloadavg(), "ceilings": limits}
    if file is not None:
        result["captured_loss"] = true_loss
    result["owed"] = ceilings.owed(row.tokens, row.vocabulary, row.width, size, 1 + suite.teacher)
    result["rounds"] = max((len(record.get("samples_s", ())) for record in records.values()), default=0)
    return result | {
        "provenance": options.provenance(),
        "contenders": [records[name] for name in row.contenders if name in records],
    }


def remeasure_accuracy(
    suite: Suite, row: Row, found: dict[str, Any] | None, options: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Verifies the contenders of a recorded row again without timing them; without a record, returns a row of verifications.

    Raises:
        harness.AnotherPath: a contender now runs another path than the one that was timed.
    """
    names = _names(suite, row, options)
    there = {record["name"]: record for record in found["contenders"]} if found else {}
    task = progress.add_task(row.id, total=len(names))
    records = {}
    for name in names:
        old = there.get(name, {})
        records[name] = suite.blank(suite.contenders[name], row, options.device, old.get("workspace_bytes"))
    inputs = suite.drawn(row, options.device, None)
    _verify_all(suite, row, records, names, inputs, options.device, progress, task, None)
    progress.remove_task(task)
    made = options.provenance()
    for name, record in records.items():
        if record["status"] == "ready":
            record["status"] = "verified" if "verification" in record else "not timed"
        if "samples_s" in there.get(name, {}):
            timed = {key: value for key, value in there[name].items() if key not in ("verification", "notes")}
            failed = {"status": record["status"]} if record["status"] != "verified" else {}
            records[name] = record | timed | failed
            harness.same_path(records[name], f"{row.id}: {name}")
    kept = {**there, **records}
    result = found or asdict(row) | {"rounds": 0, "provenance": made}
    names = [name for name in row.contenders if name in kept]
    return result | {"accuracy_provenance": made, "contenders": [kept[name] for name in names]}


def _names(suite: Suite, row: Row, options: argparse.Namespace) -> list[str]:
    names = [name for name in row.contenders if options.contenders is None or name in options.contenders]
    if "undo-core-workspace" in names and "plain" in names:
        names = ["plain", *(name for name in names if name != "plain")]  # measured first, but listed in the row's order
    return names


def _verify_all(
    suite: Suite,
    row: Row,
    records: dict[str, dict[str, Any]],
    names: Sequence[str],
    inputs: Inputs,
    device: str,
    progress: Progress,
    task: Any,
    steps: dict[tuple[str, str], Callable[[], Any]] | None,
) -> float:
    """Builds, warms up and verifies the contenders, adds those that pass to ``steps`` if given, and returns the true loss."""
    oracles = Oracles(suite, inputs)
    forget_compiled(suite, names)
    for name in names:
        record, contender = records[name], suite.contenders[name]
        progress.update(task, description=f"{row.id}: {contender.label}: warm-up, check")
        if record["status"] == "ready":
            try:
                own = {mode: contender.step(problem_of(contender, record, inputs), mode) for mode in harness.SAMPLES}
                if steps is not None:
                    record["first_s"] = harness.stopwatch(device)(own["both"])
                if contender.is_loss:
                    checked = verify(contender, own, oracles.of(contender), row.dtype)
                    record = records[name] = judged(record, contender, checked, row.dtype)
                else:
                    for step in own.values():
                        step()
                if steps is not None and record["status"] == "ready":
                    steps |= {(name, mode): step for mode, step in own.items()}
            except Exception as error:  # as above
                record["status"] = f"failed: {first_line(error)}"
            _release(device)
        progress.advance(task)
    return float(oracles.of(suite.contenders["undo-core"])[0])


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def forget_compiled(suite: Suite, names: Sequence[str]) -> None:
    """Resets torch's compiler before a phase that compiles: it refuses to compile one function for many shapes."""
    if any(suite.contenders[name].compiles for name in names):
        torch.compiler.reset()


# -- the same steps under pytest-benchmark -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A contender in one row and one mode."""

    row: Row
    device: str
    contender: str
    mode: str


def parametrize(metafunc: Any, suite: Suite) -> None:
    """Parametrizes a benchmark by every contender of the default and the quick rows, in both modes; ``-k`` chooses."""
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
    """Verifies and times a contender; a group in pytest-benchmark's table is one row in one mode.

    Contenders run one after the other, not interleaved. For ratios between contenders, use the tables of the scripts.
    """
    import pytest

    contender = suite.contenders[case.contender]
    record = suite.blank(contender, case.row, case.device, None)
    if record["status"] != "ready":
        pytest.skip(record["status"])
    inputs = problem_of(contender, record, suite.drawn(case.row, case.device, None))
    steps = {mode: contender.step(inputs, mode) for mode in harness.SAMPLES}
    if contender.is_loss:
        record = judged(record, contender, verify(contender, steps, suite.oracle(inputs), case.row.dtype), case.row.dtype)
        if record["status"] != "ready":
            pytest.fail(f"{contender.name}: {record['status']}: {record['verification']}")
    step = steps[case.mode]

    def run() -> None:
        step()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{suite.name} {case.row.id} {case.mode}"
    _, ran = observed(lambda: benchmark.pedantic(run, rounds=LEAST, warmup_rounds=1))
    record |= {"samples_s": True, "ran": {case.mode: ran}}
    harness.same_path(record, f"{case.row.id}: {contender.name}")
    benchmark.extra_info |= {"verification": record.get("verification"), "ran": ran, "notes": record["notes"]}
    forget_compiled(suite, [case.contender])
