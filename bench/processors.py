"""The table of linear_kl_div by processor, from the results of every processor on which it was measured.

    python bench/processors.py                       prints the table, and a line if this machine's processor is not in it
    python bench/processors.py docs/benchmarks.md    writes it between the page's markers
    python bench/processors.py --measure             measures this machine's processor time, on one thread, first

The cases are rows of bench/bench_kl.py, with undo-core, plain torch and the bare products. The files are those of bench/results/kl-cpu,
with times of a quiet machine, and of bench/results/processors. There the clock may be the processor time of one thread, which other
processes on the machine change little, and figures may be reported ones of a processor that was measured elsewhere.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from summaries import markdown

from undo_core.version import __version__

CHECKED = 64  # tokens that are verified here; bench_kl.py verifies all of them
FOLDERS = ("bench/results/kl-cpu", "bench/results/processors")
CASES = [
    (*shape, dtype)
    for dtype in ("float32", "bfloat16")
    for shape in ((1024, 32000, 320), (512, 256000, 320), (256, 128256, 2048))
]
MEASURE = "python bench/bench_kl.py --only f32-32k bf16-32k f32-256k bf16-256k-512 f32-1b bf16-1b --contenders undo-core plain products"
SAID = (
    "Forward and backward: undo-core's time, then plain torch's and the bare products' in multiples of it, all in the same dtype. A name "
    "after the vector units, such as amx, is that of the bfloat16 product; where there is none, weights are converted to float32."
)


def measure(rounds: int = 2) -> None:
    """Measures every case on one thread, contenders in turn, and writes bench/results/processors/MACHINE-one-thread-VERSION.json.

    Raises:
        SystemExit: a contender computes something else.
    """
    import bench_kl
    from peers import CONTENDERS
    from problems import draw, errors, verdict

    torch.set_num_threads(1)
    facts = harness.machine("cpu")
    facts |= {
        "name": f"{facts['name']}-one-thread",
        "cores": 1,
        "note": "Processor time of one thread, on a machine with other work.",
    }
    path, rows = harness.ROOT / FOLDERS[1] / f"{facts['name']}-{__version__}.json", []
    for row in bench_kl.ROWS["cpu"]:
        if row.softcap is not None or (row.tokens, row.vocabulary, row.width, row.dtype) not in CASES:
            continue
        inputs = draw(row, "cpu", True)
        few, kept = inputs.part(slice(CHECKED)), {}
        wanted = bench_kl.SUITE.oracle(few)
        for name in ("undo-core", "plain"):
            kept[name] = errors(CONTENDERS[name].step(few)(), wanted) | {"tokens": CHECKED}
            if verdict(kept[name], row.dtype) == "different":
                raise SystemExit(f"{row.id}: {name} computes something else: {kept[name]}")
        steps = {name: CONTENDERS[name].step(inputs) for name in ("undo-core", "plain", "products")}
        steps["undo-core"]()  # allocates its workspace
        samples: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                start = time.process_time()
                step()
                samples[name].append(time.process_time() - start)
        contenders = [
            {"name": name, "status": "measured", "samples_s": taken, "verification": kept.get(name)}
            for name, taken in samples.items()
        ]
        about = {"id": row.id, "tokens": row.tokens, "vocabulary": row.vocabulary, "width": row.width, "dtype": row.dtype}
        made = harness.provenance("bench/processors.py", ["--measure"])
        rows.append(about | {"softcap": None, "contenders": contenders, "provenance": made})
        harness.write_json(path, {"format": 1, "suite": "kl-cpu", "machine": facts, "rows": rows})
        print(f"{row.id}: " + ", ".join(f"{name} {min(taken):.2f} s" for name, taken in samples.items()), flush=True)


def records() -> Iterator[dict[str, Any]]:
    """Yields the results files."""
    for folder in FOLDERS:
        for path in sorted((harness.ROOT / folder).glob("*.json")):
            yield json.loads(path.read_text())


def figures(row: dict[str, Any]) -> tuple[float, float | None, float | None] | None:
    """Returns undo-core's seconds, and the times of plain torch and of the bare products over it; None if it was not timed."""
    if "reported" in row:
        own, plain, products = (row["reported"][name] for name in ("undo-core", "plain", "products"))
        return own, plain, products
    own = harness.contender(row, "undo-core")
    seconds = None if own is None or own["status"] != "measured" else harness.median(own)
    if seconds is None:
        return None
    plain, products = (harness.ratio(harness.contender(row, name), own) for name in ("plain", "products"))
    return seconds, plain, products


def collected() -> dict[str, tuple[dict[str, Any], dict[tuple[int, int, int, str], tuple[float, float | None, float | None]]]]:
    """Returns, by processor: its machine's facts, and the figures of each case."""
    found: dict[str, Any] = {}
    for results in records():
        facts = results["machine"]
        _, cases = found.setdefault(harness.processor(facts), (facts, {}))
        for row in results["rows"]:
            case = (row["tokens"], row["vocabulary"], row["width"], row["dtype"])
            timed = figures(row) if row["softcap"] is None and case in CASES else None
            if timed is not None:
                cases[case] = timed
    return {name: one for name, one in found.items() if one[1]}


def table() -> str:
    """Returns the table as Markdown, with what each processor is and where its figures are from."""
    every = collected()
    header = ["tokens × vocabulary × width", *(_short(facts) for facts, _ in every.values())]
    lines = []
    for case in CASES:
        tokens, vocabulary, width, dtype = case
        cells = [_cell(cases.get(case)) for _, cases in every.values()]
        lines.append([f"{tokens:,} × {harness.short(vocabulary)} × {width:,}, {dtype}", *cells])
    notes = [f"*{_short(facts)}*: {facts['note']}" for facts, _ in every.values() if "note" in facts]
    return "\n\n".join([markdown(header, lines), SAID, *notes])


def _short(facts: dict[str, Any]) -> str:
    maker = re.sub(r"\((R|TM)\)|CPU|Processor", "", facts["cpu"]).split("@")[0]
    return f"{' '.join(maker.split())}, {facts['kernels_vector_units']}, {facts['cores']} core{'s' * (facts['cores'] != 1)}"


def _cell(timed: tuple[float, float | None, float | None] | None) -> str:
    if timed is None:
        return "–"
    seconds, *ratios = timed
    return " · ".join([harness.seconds(seconds), *("–" if ratio is None else harness.times(ratio) for ratio in ratios)])


def missing() -> str | None:
    """Returns a line if this machine's processor has no figures in the table, or not of every case."""
    facts = harness.machine("cpu")
    _, cases = collected().get(harness.processor(facts), (facts, {}))
    lacking = [case for case in CASES if case not in cases]
    if not lacking:
        return None
    how_many = "no case" if len(lacking) == len(CASES) else f"{len(CASES) - len(lacking)} of {len(CASES)} cases"
    return f"The table by processor has {how_many} of this machine, {harness.whereabouts(facts)}. To measure them: {MEASURE}"


def main(arguments: Sequence[str]) -> None:
    """Prints the table, or writes it to a page."""
    if arguments == ["--measure"]:
        measure()
        arguments = []
    if arguments:
        page = Path(arguments[0])
        text = page.read_text()
        page.write_text(
            re.sub(
                r"(<!-- processors -->\n).*?(<!-- /processors -->)", lambda m: f"{m[1]}\n{table()}\n\n{m[2]}", text, flags=re.S
            )
        )
    else:
        print(table())
    line = missing()
    if line:
        print(f"\n{line}")


if __name__ == "__main__":
    main(sys.argv[1:])
