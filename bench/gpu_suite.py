"""Everything that needs a GPU, on a machine without network: python 3.11, torch, triton, numpy and pytest are enough to begin.

In the order in which they teach most in the first minutes:

tests      the Triton tests on the GPU, their files side by side
plans      milliseconds of each kernel of both plans at three widths, beside what the cost model predicts
products   the library's products on the same shapes, random data, by tokens and dtype of the result
tiles      the fastest tile of the bfloat16 loss and statistics kernels
counters   hardware counters of one launch of each of four kernels, with Nsight Compute's ncu
bench      the losses, the noise and RMU beside what one would use instead
memory     a distillation step of Gemma 2 2B's shape in every mode, 10 x 1024 tokens
sanitize   compute-sanitizer's memcheck and racecheck on small problems
tune       the fastest tile of each kernel, dtype and width; keep the file as bench/results/tiles/GPU.json, then
           python bench/tiles.py
pipeline   the arithmetic pipeline at the published model's shape, steps reduced

Each part is one file PART.json in --out ($OUT, else runs/gpu), replaced whole after every row. A row that passed there, or in
--from, with the same source, versions and GPU, is not run again: a command that was stopped goes on when it is given again. No part
lasts longer than --minutes, 9 by default; without --part, parts follow each other while that lasts. Exit status 0: every row
that was asked for passed. What a row needs and the machine lacks is said in one line, and counts as not passed.

``--rehearse`` runs the rows of tests, plans, products and counters on small sizes under Triton's interpreter, where no GPU is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch

ROOT = harness.ROOT
PARTS = ("tests", "plans", "products", "tiles", "counters", "bench", "memory", "sanitize", "tune", "pipeline")
REHEARSED = ("tests", "plans", "products", "counters")
FORMAT = 1
LEAST = 20.0  # seconds left under which no row is begun
SAID = 4000  # characters of a failed row's output that are kept
SANITIZED = (
    "tests/undo_kernels/triton/test_triton_rmu.py",
    "tests/undo_kernels/triton/test_triton_noise.py::test_any_first_index",
    "tests/undo_kernels/triton/test_vocab_loss_options.py::test_few_rows",
)


@dataclass(frozen=True)
class Row:
    """One command of a part.

    Attributes:
        id: in the file.
        command: with ``{python}`` for this interpreter and ``{result}`` for a file that it writes JSON to.
        needs: modules without which it cannot run.
        tool: program without which it cannot run.
        seconds: that it may take.
        printed: whether the result is the last line that it prints.
        parallel: commands that run side by side before it and may fail.
    """

    id: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ("torch", "triton", "numpy")
    tool: str | None = None
    seconds: float = 500.0
    printed: bool = False
    parallel: tuple[tuple[str, ...], ...] = ()


def rows_of(part: str) -> list[Row]:
    """A part's rows, the most telling first."""
    pytest = ("{python}", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    kernels = ("torch", "triton", "numpy")
    whole = (*kernels, "transformers", "safetensors", "rich")
    if part == "tests":
        return [Row("triton", ("{python}", "bench/gpu_tests.py"), ("pytest", *kernels), printed=True)]
    measure = ("{python}", "bench/gpu_kernels.py")
    if part == "plans":
        return [Row(f"plans-{width}", (*measure, "plans", width), printed=True) for width in ("768", "2304", "320")]
    if part == "products":
        return [Row("products", (*measure, "products"), printed=True)]
    if part == "counters":
        names = "regex:stats_rows|loss_rows|stats_tiles|loss_tiles"
        counted = ("ncu", "--set", "detailed", "--csv", "--kernel-name", names, "--launch-count", "4")
        return [Row("counters", (*counted, *measure, "once"), kernels, "ncu", 200)]
    if part == "sanitize":
        rows = []
        for tool in ("memcheck", "racecheck"):  # torch's allocator would hide what lies between two of its tensors
            check = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool, "--error-exitcode", "9")
            command = (*check, "--target-processes", "all", *pytest, "-x", *SANITIZED)
            rows.append(Row(tool, command, ("torch", "triton", "pytest"), "compute-sanitizer", 250))
        return rows
    if part == "tiles":
        return [row for row in rows_of("tune") if row.id.startswith(("loss-bfloat16", "stats-bfloat16"))]
    if part == "tune":
        rows = []
        for dtype in ("bfloat16", "float32"):
            for kernel in ("loss", "stats", "jsd", "cross"):
                command = ("{python}", "-m", "undo_kernels.triton.tuner", kernel, dtype)
                count = max(1, min(16, os.cpu_count() or 1))
                first = tuple((*command, "320", "--first", str(i), str(count)) for i in range(count))
                for width in ("2304", "768", "320"):
                    rows.append(
                        Row(
                            f"{kernel}-{dtype}-{width}",
                            (*command, width),
                            printed=True,
                            parallel=first if width == "2304" else (),
                        )
                    )
        return rows
    if part == "bench":
        rows = [
            Row(
                f"{script}-{row}",
                ("{python}", f"bench/bench_{script}.py", "--device", "cuda", "--only", row, "--out", "{result}"),
                whole,
            )
            for script, names in (
                ("kl", ("bf16-256k-d2304", "bf16-256k-d768", "bf16-256k-d320", "error")),
                ("noise", ("f32-uniform", "f32-normal", "bf16-uniform")),
                ("rmu", ("op-f32", "op-f32-frozen", "op-bf16", "op-bf16-frozen")),
            )
            for row in names
        ]
        return sorted(rows, key=lambda row: row.id != "kl-bf16-256k-d2304")
    if part == "memory":
        command = ("{python}", "bench/bench_step_gpu.py", "--mode")
        modes = {"plain": (), "float32": (), "checkpointing": (), "in-backward": (), "lean-stochastic": ()}
        modes |= {"in-backward-8bit": ("torchao",), "leanest": ("torchao",)}
        return [Row(mode, (*command, mode), whole + needs, printed=True, seconds=200) for mode, needs in modes.items()]
    reduced = ("--pretrain.train.steps=60", "--distill.train.steps=40", "--unlearn.train.steps=5", "--data.train_rows=50000")
    reduced += ("--noise.alphas=[0.7]", "--relearn.rates=[1e-4]", "--relearn.evaluate_at=[0,10]", "--relearn.headline_step=10")
    command = (
        "{python}",
        "-m",
        "undo_core",
        "run",
        "configs/arithmetic.yaml",
        f"--output=runs/gpu-arithmetic-{source()}",
        *reduced,
    )
    return [Row("arithmetic", command, (*whole, "jsonargparse", "matplotlib"))]


# -- what a row's result belongs to --------------------------------------------------------------------------------------------


def source() -> str:
    """Hash of the code that a row runs; a copy without git has no commit to name."""
    digest = hashlib.sha256()
    for folder in ("bench", "configs", "csrc", "kernels", "tests", "undo_core"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".yaml") and path.is_file():
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def key_here() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"commit": harness.commit(), "source": source(), "versions": harness.versions(), "gpu": gpu}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two results are of the same code, versions and GPU; the commit is for people."""
    return all(a.get(name) == b.get(name) for name in ("source", "versions", "gpu"))


def load(part: str, folders: Sequence[Path], key: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows that passed under the same key, by id; the first folder that has one counts."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        for row in json.loads(path.read_text())["rows"]:
            if row["status"] == "passed" and same(row["key"], key):
                found.setdefault(row["id"], row)
    return found


# -- running -------------------------------------------------------------------------------------------------------------------


def lacking(row: Row) -> str | None:
    """Why a row cannot run here, in one line."""
    missing = [name for name in row.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"no {', '.join(missing)} here: pip install, or --wheels DIR"
    if row.tool and shutil.which(row.tool) is None:
        return f"no {row.tool} on the PATH"
    return None


def rehearsal(row: Row) -> Row:
    """The same row on small sizes: a few tests, without programs that only a GPU's machine has."""
    few = ("--only", "documented or its_teacher", "--files", "vocab_loss_numerics", "triton_rmu")
    command = row.command[row.command.index("{python}") :]
    command += few if command[1].endswith("gpu_tests.py") else ("--rehearse",)
    return replace(row, command=command, tool=None, printed=True)


def execute(row: Row, limit: float) -> dict[str, Any]:
    """Runs a row's command for at most so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"

        def words(command: Sequence[str]) -> list[str]:
            return [sys.executable if word == "{python}" else str(result) if word == "{result}" else word for word in command]

        deadline = time.monotonic() + limit
        beside = [
            subprocess.Popen(words(command), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for command in row.parallel
        ]
        for process in beside:
            try:
                process.wait(max(deadline - time.monotonic() - LEAST, 0.1))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        with (Path(folder) / "said").open("w+") as errors, (Path(folder) / "printed").open("w+") as printed:
            process = subprocess.Popen(words(row.command), cwd=ROOT, stdout=printed, stderr=errors, start_new_session=True)
            try:
                code = process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)  # its own children too
                process.wait()
            printed.seek(0)
            errors.seek(0)
            lines = printed.read().strip().splitlines()
            text = "\n".join([*lines, errors.read().strip()]).strip()[-SAID:]
        if code is None:
            return {"status": "stopped", "said": f"stopped after {limit:.0f} s\n{text}"}
        if code:
            return {"status": "failed", "said": f"exit status {code}\n{text}"}
        record: dict[str, Any] = {"status": "passed", "said": lines[-1][:200] if lines else ""}
        try:
            if row.printed:
                record |= {"said": "", "result": json.loads(lines[-1])}
            elif "{result}" in row.command:
                record |= {"said": "", "result": json.loads(result.read_text())}
        except (ValueError, IndexError, OSError) as error:
            return {"status": "failed", "said": f"no result: {error}\n{text}"}
        why = complaint(record.get("result"))
        return record | {"status": "failed", "said": why} if why else record


def complaint(result: Any) -> str | None:
    """Why a result that was written is none: undo-core was not measured, or what it ran was not Triton's kernels; no tile."""
    if not isinstance(result, dict):
        return None
    if "tried" in result and result["best"] is None:
        return "no tile counts"
    if "mode" in result:
        own = [result | {"name": result["mode"]}] if result["mode"] != "plain" else []
    else:
        records = [record for row in result.get("rows", ()) for record in row["contenders"]]
        records += (result.get("error_versus_kl") or {}).get("curves", ())
        own = [record for record in records if record["name"].startswith("undo-core")]
    for record in own:
        if record.get("status", "measured") != "measured":
            return f"{record['name']}: {record['status']}"
        used = {call["backend"] for calls in record.get("ran", {}).values() for call in calls}
        if used != {"triton"}:
            return f"{record['name']}: ran on {', '.join(sorted(used)) or 'nothing that was noted'}, wanted triton"
    return None


Runner = Callable[[Row, float], dict[str, Any]]


def run_part(
    part: str,
    out: Path,
    earlier: Sequence[Path],
    key: dict[str, Any],
    seconds: float,
    machine: dict[str, Any],
    runner: Runner = execute,
    clock: Callable[[], float] = time.monotonic,
    note: Callable[[str], None] = print,
    rehearse: bool = False,
) -> list[dict[str, Any]]:
    """Runs what a part lacks within so many seconds, its file replaced after every row; returns all its rows."""
    began, rows = clock(), rows_of(part)
    rows = [rehearsal(row) for row in rows] if rehearse else rows
    done = load(part, [out, *earlier], key)
    for row in rows:
        left = seconds - (clock() - began)
        if row.id in done:
            note(f"{part} {row.id}: passed before")
            continue
        started, why = clock(), lacking(row)
        if why:
            record = {"status": "skipped", "said": why}
        elif left < LEAST:
            record = {"status": "left", "said": "no time left; the same command goes on here"}
        else:
            record = runner(row, min(row.seconds, left - 5))
        done[row.id] = {"id": row.id, "key": key, "seconds": round(clock() - started, 1), **record}
        first = (record.get("said") or "").splitlines()
        note(f"{part} {row.id}: {record['status']} in {done[row.id]['seconds']} s{': ' + first[0] if first else ''}")
        ordered = [done[r.id] for r in rows if r.id in done]
        harness.write_json(out / f"{part}.json", {"format": FORMAT, "part": part, "machine": machine, "rows": ordered})
    ordered = [done[row.id] for row in rows]
    harness.write_json(out / f"{part}.json", {"format": FORMAT, "part": part, "machine": machine, "rows": ordered})
    return ordered


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """The closing table."""
    states = ("passed", "failed", "stopped", "skipped", "left")
    lines = [f"{'part':<10}" + "".join(f"{state:>9}" for state in states)]
    for part, rows in results.items():
        lines.append(f"{part:<10}" + "".join(f"{sum(row['status'] == state for row in rows):>9}" for state in states))
    for part, rows in results.items():
        for row in rows:
            if row["status"] != "passed":
                lines.append(f"{part} {row['id']}: {row['status']}: {(row['said'].splitlines() or [''])[0]}")
    return "\n".join(lines)


def prepare(wheels: Path | None, note: Callable[[str], None] = print) -> None:
    """Carried wheels, and the C++ extension; what cannot be had is said."""
    if wheels is not None:
        site = Path(tempfile.gettempdir()) / "undo-gpu-site"
        found = sorted(map(str, wheels.glob("*.whl")))
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--target",
            str(site),
            "--upgrade",
            *found,
        ]
        subprocess.run(command, check=True)
        sys.path.append(str(site))
        os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{site}"  # behind: its torch is the machine's
    if not list((ROOT / "kernels" / "undo_kernels").glob("_cpu*.so")):
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode or "NO C++ KERNELS" in done.stderr:
            note(f"NO C++ KERNELS, the reference runs on the CPU: {(done.stderr.strip().splitlines() or [''])[-1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="that the command may last (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"), help="folder of the files"
    )
    parser.add_argument(
        "--from", type=Path, dest="earlier", action="append", default=[], metavar="DIR", help="folder of earlier files"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes under Triton's interpreter, without a GPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to install first, without an index")
    options = parser.parse_args(arguments)
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: got {options.wheels}, which holds no *.whl; wanted a folder of wheels")
    if not options.minutes > 0:
        parser.error(f"--minutes: got {options.minutes:g}, wanted a number > 0")
    began = time.monotonic()
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        if options.part and options.part not in REHEARSED:
            parser.error(f"--rehearse: got --part {options.part}, wanted one of {', '.join(REHEARSED)}")
    elif not torch.cuda.is_available():
        parser.error("got a torch that sees no GPU, wanted one that does, or --rehearse")
    prepare(options.wheels)
    key, machine = key_here(), harness.machine("cpu" if options.rehearse else "cuda")
    results = {}
    for part in [options.part] if options.part else REHEARSED if options.rehearse else PARTS:
        left = 60 * options.minutes - (time.monotonic() - began)
        results[part] = run_part(part, options.out, options.earlier, key, left, machine, rehearse=options.rehearse)
    print(summary(results))
    return int(any(row["status"] != "passed" for rows in results.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
