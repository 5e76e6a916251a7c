"""Everything that needs a GPU, on a machine without network: python 3.11, torch, triton, numpy and pytest are enough to begin.

In the order in which they teach most in the first minutes:

tests      the Triton tests on the GPU, spread over the CPUs, identical heads first
plans      milliseconds of each kernel of both plans at three widths, beside what the cost model predicts
products   the library's products on the same shapes, random data, by tokens and dtype of the result
tiles      the fastest tile of the bfloat16 statistics and loss kernels
counters   hardware counters of one launch of each of four kernels, with Nsight Compute's ncu
peers      the loss beside plain PyTorch, Liger and TRL, at three widths
memory     a distillation step of Gemma 2 2B's shape in every mode, 10 x 1024 tokens
sanitize   compute-sanitizer's memcheck and racecheck on small problems
bench      the losses, the noise and RMU beside everything that one would use instead
tune       the fastest tile of each kernel, dtype and width; keep the file as bench/results/tiles/GPU.json, then
           python bench/tiles.py
pipeline   the arithmetic pipeline at the published model's shape, steps reduced

All results are in one file, gpu.json in --out ($OUT, else runs/gpu), replaced whole after every row. A row that passed there, or in
--from, with the same source, versions and GPU, is not run again: a command that was stopped goes on when it is given again. The
first seven parts have limits of their own, {first:.0f} s together (gpu_parts.SECONDS), and the command lasts --minutes at most; a part
that was named with --part has all of it. A row that fails, or that is stopped, takes no other with it. What a row needs and the
machine lacks is said in one line. Exit status 0: every row that was asked for passed.

``--rehearse`` runs a small version of every part on a CPU, with kernels interpreted; there a row may lack a program.
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
from pathlib import Path
from typing import Any

import gpu_parts
import harness
import torch
from gpu_parts import PARTS, Row, complaint, headline

ROOT = harness.ROOT
FILE = "gpu.json"
FORMAT = 2  # since 2: all parts in one file
LEAST = 10.0  # seconds left under which no row is begun
SAID = 4000  # characters of a failed row's output that are kept


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


def load(folders: Sequence[Path], key: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows that passed under the same key, by part and id; the first folder that has one counts."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in (folder / FILE for folder in folders):
        parts = json.loads(path.read_text())["parts"] if path.exists() else {}
        for part, rows in parts.items():
            for row in rows:
                if row["status"] == "passed" and same(row["key"], key):
                    found.setdefault(part, {}).setdefault(row["id"], row)
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


def execute(row: Row, limit: float) -> dict[str, Any]:
    """Runs a row's command for at most so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"

        def words(command: Sequence[str]) -> list[str]:
            return [sys.executable if word == "{python}" else str(result) if word == "{result}" else word for word in command]

        deadline = time.monotonic() + limit
        beside = [_started(words(command), subprocess.DEVNULL, subprocess.DEVNULL) for command in row.parallel]
        for process in beside:
            _ended(process, deadline - LEAST)
        with (Path(folder) / "said").open("w+") as errors, (Path(folder) / "printed").open("w+") as printed:
            process = _started(words(row.command), printed, errors)
            code = _ended(process, deadline)
            printed.seek(0)
            errors.seek(0)
            lines = printed.read().strip().splitlines()
            wrong = errors.read().strip().splitlines()
            text = "\n".join([*lines, *wrong]).strip()[-SAID:]
        record: dict[str, Any] = {"status": "passed", "said": ""}
        try:
            if row.printed:
                record["result"] = last_json(lines)
            elif "{result}" in row.command:
                record["result"] = json.loads(result.read_text())
        except (ValueError, OSError) as error:
            record |= {"status": "failed", "said": f"no result: {error}\n{text}"}
        if code is None:
            return record | {"status": "stopped", "said": f"stopped after {limit:.0f} s\n{text}"}
        if code:
            return record | {"status": "failed", "said": f"exit status {code}: {(wrong or lines or [''])[-1][:300]}\n{text}"}
        return record


def _started(command: list[str], out: Any, errors: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, start_new_session=True)


def _ended(process: subprocess.Popen[bytes], deadline: float) -> int | None:
    """Returns the exit status, or None for a process that had to be stopped, with all its children."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def last_json(lines: Sequence[str]) -> Any:
    """Returns the last line that is JSON: what a command prints row by row is there when it is stopped."""
    for line in reversed(lines):
        if line.startswith(("{", "[")):
            try:
                return json.loads(line)
            except ValueError:  # cut off, or something else that begins so
                continue
    raise ValueError("printed no line of JSON")


Runner = Callable[[Row, float], dict[str, Any]]


class Book:
    """The file of results, and what an earlier command left in it."""

    def __init__(self, out: Path, earlier: Sequence[Path], key: dict[str, Any], about: dict[str, Any]) -> None:
        self.path, self.key, self.about = out / FILE, key, about
        self.rows = load([out, *earlier], key)

    def keep(self, part: str, row: Row, record: dict[str, Any]) -> dict[str, Any]:
        """Adds a row's record and writes the file."""
        record = {"id": row.id, "key": self.key, **record}
        self.rows.setdefault(part, {})[row.id] = record
        parts = {part: list(rows.values()) for part, rows in self.rows.items()}
        harness.write_json(self.path, {"format": FORMAT, **self.about, "parts": parts})
        return record


def run_part(
    part: str,
    rows: Sequence[Row],
    book: Book,
    seconds: float,
    runner: Runner = execute,
    clock: Callable[[], float] = time.monotonic,
    note: Callable[[str], None] = print,
    check: Callable[[Any], str | None] = complaint,
) -> list[dict[str, Any]]:
    """Runs what a part lacks within so many seconds; returns the records of all its rows."""
    began, found = clock(), []
    for row in rows:
        if row.id in book.rows.get(part, {}):
            note(f"{part} {row.id}: passed before")
            found.append(book.rows[part][row.id])
            continue
        started, why = clock(), lacking(row)
        left = seconds - (started - began)
        if why:
            record = {"status": "skipped", "said": why}
        elif left < LEAST:
            record = {"status": "left", "said": "no time left; the same command goes on here"}
        else:
            record = runner(row, min(row.seconds, left - 5))
            refused = check(record.get("result")) if record["status"] == "passed" else None
            record |= {"status": "failed", "said": refused} if refused else {}
        record = book.keep(part, row, {"seconds": round(clock() - started, 1), **record})
        found.append(record)
        first = (record.get("said") or "").splitlines()[:1]
        note(": ".join([f"{part} {row.id}: {record['status']} in {record['seconds']} s", *first]))
        if record.get("result") is not None:
            note(f"  {headline(record['result'])[:1500]}")
    return found


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """The closing table."""
    states = ("passed", "failed", "stopped", "skipped", "left")
    lines = [f"{'part':<10}" + "".join(f"{state:>9}" for state in states)]
    for part, rows in results.items():
        lines.append(f"{part:<10}" + "".join(f"{sum(row['status'] == state for row in rows):>9}" for state in states))
    for part, rows in results.items():
        for row in rows:
            if row["status"] != "passed":
                lines.append(": ".join([f"{part} {row['id']}", row["status"], *row["said"].splitlines()[:1]]))
    return "\n".join(lines)


def install(wheels: Path) -> list[str]:
    """Installs carried wheels behind the machine's own packages; returns a line about each that does not install."""
    site = Path(tempfile.gettempdir()) / "undo-gpu-site"
    options = (
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--disable-pip-version-check",
        "--upgrade",
        "--target",
        str(site),
    )

    def refusal(files: Sequence[Path]) -> str | None:
        command = [sys.executable, "-m", "pip", "install", *options, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stderr.strip().splitlines() or ["?"])[-1] if done.returncode else None

    files, refused = sorted(wheels.glob("*.whl")), []
    if refusal(files):  # pip installs all or none
        refused = [f"{file.name}: {why}" for file in files if (why := refusal([file]))]
    sys.path.append(str(site))
    os.environ["PYTHONPATH"] = f"{os.environ.get('PYTHONPATH', '')}{os.pathsep}{site}"
    return refused


def deadlines(parts: Sequence[str], whole: float) -> dict[str, float]:
    """Returns the second of the command at which each part must end: its limit and those before it, scaled to fill the whole."""
    limited, used, ends = sum(gpu_parts.SECONDS[part] for part in parts), 0.0, {}
    for part in parts:
        used += gpu_parts.SECONDS[part]
        ends[part] = whole * used / limited if gpu_parts.SECONDS[part] else whole
    return ends


def main(arguments: Sequence[str] | None = None) -> int:
    description = (__doc__ or "").replace("{first:.0f}", f"{sum(gpu_parts.SECONDS.values()):.0f}")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="this one alone; may be given again")
    parser.add_argument("--minutes", type=float, help="that the command may last (default: 9.3, and 30 with --rehearse)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"), help=f"folder of {FILE}"
    )
    parser.add_argument(
        "--from", type=Path, dest="earlier", action="append", default=[], metavar="DIR", help="folder of an earlier file"
    )
    parser.add_argument("--rehearse", action="store_true", help="small sizes under Triton's interpreter, without a GPU")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels to install first, without an index")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.wheels is not None and not any(options.wheels.glob("*.whl")):
        parser.error(f"--wheels: got {options.wheels}, which holds no *.whl; wanted a folder of wheels")
    minutes = options.minutes if options.minutes is not None else 30.0 if options.rehearse else 9.3
    if not minutes > 0:
        parser.error(f"--minutes: got {minutes:g}, wanted a number > 0")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("got a torch that sees no GPU, wanted one that does, or --rehearse")
    about: dict[str, Any] = {"rehearsal": options.rehearse, "machine": harness.machine("cpu" if options.rehearse else "cuda")}
    about["wheels_refused"] = install(options.wheels) if options.wheels else []
    for line in about["wheels_refused"]:
        print(f"wheel {line}")
    book = Book(options.out, options.earlier, key_here(), about)
    parts = [part for part in PARTS if part in (options.part or PARTS)]
    ends, results = deadlines(parts, 60 * minutes), {}
    for part in parts:
        began_part = time.monotonic()
        rows = gpu_parts.rows_of(part, options.rehearse, f"runs/gpu-arithmetic-{book.key['source']}")
        check = (lambda result: None) if options.rehearse else complaint  # a CPU's own kernels stand in for some of Triton's
        results[part] = run_part(part, rows, book, ends[part] - (began_part - began), check=check)
        print(f"-- {part}: {time.monotonic() - began_part:.0f} s, {time.monotonic() - began:.0f} s of the command", flush=True)
    print(summary(results))
    passed = ("passed", "skipped") if options.rehearse else ("passed",)
    return int(any(row["status"] not in passed for rows in results.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
