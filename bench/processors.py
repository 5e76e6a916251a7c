"""The table of linear_kl_div by processor, from the results of every processor on which it was measured.

    python bench/processors.py                       prints the table, and a line if this machine's processor is not in it
    python bench/processors.py docs/benchmarks.md    writes it between the page's markers

Measured are the rows of CASES of bench/bench_kl.py, with undo-core, plain torch and the bare products. The files are those of
bench/results/kl-cpu and bench/results/processors. A processor that was measured elsewhere has its figures as they were reported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
from summaries import markdown

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
    notes = [
        f"*{_short(facts)}*: {harness.whereabouts(facts)}. {facts['note']}" for facts, _ in every.values() if "note" in facts
    ]
    return "\n\n".join([markdown(header, lines), SAID, *notes])


def _short(facts: dict[str, Any]) -> str:
    maker = re.sub(r"\((R|TM)\)|CPU|Processor", "", facts["cpu"]).split("@")[0]
    return f"{' '.join(maker.split())}, {facts['kernels_vector_units']}, {facts['cores']} cores"


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
