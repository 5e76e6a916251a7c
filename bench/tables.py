"""Writes the tables of the benchmarks from the recorded results between markers in Markdown files.

``<!-- bench:kl-cpu -->`` ... ``<!-- /bench:kl-cpu -->`` encloses the summary, ``<!-- bench:kl-cpu:full -->`` ... all numbers of
all rows. The text between them names its results file, so that a check needs no other argument.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ceilings
import harness
from summaries import SUMMARIES, markdown

BLOCK = re.compile(
    r"(<!-- bench:(?P<suite>[a-z0-9-]+)(?P<full>:full)? -->\n)(?P<body>.*?)(<!-- /bench:(?P=suite)(?(full):full) -->)", re.S
)
SOURCE = re.compile(r"From \[[^\]]*\]\(([^()\s]+\.json)\)")

SHOWN_KL = 1e-4  # the KL at which the summary shows errors


def render(results: dict[str, Any], source: str, full: bool) -> str:
    """Returns the Markdown between the markers; ``source`` is the link to the results."""
    check(results)
    if results["suite"] in SUMMARIES:
        return "\n\n".join([SUMMARIES[results["suite"]](results), _footer(results, source)]) + "\n"
    parts = [_row_table(row) for row in results["rows"]] if full else [_summary(results)]
    if full and results.get("error_versus_kl"):
        parts.append(_error_table(results["error_versus_kl"]))
    return "\n\n".join([*parts, _footer(results, source)]) + "\n"


def check(results: dict[str, Any]) -> None:
    """Checks that an error shown beside a time belongs to what was timed.

    Raises:
        SystemExit: undo-core ran another backend, plan or form.
    """
    timed = {}
    for row in results["rows"]:
        for record in row["contenders"]:
            timed[row["id"], record["name"]] = record
            _same_path(record, f"{row['id']}: {record['name']}")
    for curve in (results.get("error_versus_kl") or {"curves": []})["curves"]:
        where = f"errors against KL, {curve['name']}, {curve['dtype']}"
        if curve["points"] and "ran" not in curve:
            raise SystemExit(f"{where}: what ran was not noted")
        record = timed.get((curve.get("row"), curve["name"]), {})
        _same_path({**record, "verification": curve}, where)


def _same_path(record: dict[str, Any], where: str) -> None:
    try:
        harness.same_path(record, where)
    except harness.AnotherPath as error:
        raise SystemExit(str(error)) from None


def _problem(row: dict[str, Any]) -> str:
    softcap = "" if row["softcap"] is None else f", softcap {row['softcap']:g}"
    about = ", ".join(filter(None, ["trained" if "captured_loss" in row else "", row.get("model", "")]))
    model = f" ({about})" if about else ""
    return f"{row['tokens']:,} × {harness.short(row['vocabulary'])} × {row['width']}, {row['dtype']}{softcap}{model}"


def _summary(results: dict[str, Any]) -> str:
    rows = harness.summary_rows(results)
    timed = [row for row in rows if any(record["status"] == "measured" for record in row["contenders"])]
    rows = timed or rows
    longest_first = sorted(rows, key=lambda row: -len(row["contenders"]))  # the longest list gives the order of all
    names = dict.fromkeys(record["name"] for row in longest_first for record in row["contenders"])
    section = results.get("error_versus_kl") or {"curves": []}
    curves = {curve["name"]: curve for curve in section["curves"] if curve["dtype"] == "bfloat16" and curve["points"]}
    header = ["tokens × vocabulary × width", *(_problem(row) for row in rows)]
    header += [f"error of the hidden gradient, bfloat16, KL {SHOWN_KL:g}" if curves else "gradient error"]
    lines, absent = [], []
    for name in names:
        records = [harness.contender(row, name) for row in rows]
        label = next(record["label"] for record in records if record)
        cells = [_cell(row, record) for row, record in zip(rows, records, strict=True)]
        error = _error_at(curves.get(name), SHOWN_KL) if curves else _worst_error(records)
        if error == "–" and not any(record and record["status"] in ("measured", "verified") for record in records):
            absent.append(f"{label} ({cells[0]})")
        else:
            lines.append([f"**{label}**" if name == "undo-core" else label, *cells, error])
    said = (
        "Forward and backward. First the time: undo-core's own, and the others' in multiples of it. Last the peak memory beyond "
        "inputs and gradients. *Bare products*: only the matrix products that every method must do."
    )
    if any("ceilings" in row for row in rows):
        said += (
            " In between, how near the time is to the least possible: what those products, or the bytes where they take longer, "
            "need at the best rates of a square product and of a copy in the same run, divided by the contender's time. Narrow "
            "products do not reach the rate of a square one, so the bare ones do not have 100 % either."
        )
    if curves:
        said += (
            f" The error is that of the gradient of the student's hidden states against float64, where the true KL is {SHOWN_KL:g}: "
            "student and teacher then nearly agree, and a loss that rounds logits or probabilities to 16 bits before it subtracts "
            "them loses the difference."
        )
    if any("captured_loss" in row for row in rows):
        said += " On the hidden states of trained models: last, the larger error of the two gradients on them."
    if absent:
        said += f" Not run here: {', '.join(absent)}."
    return f"{markdown(header, lines)}\n\n{said}"


def _error_at(curve: dict[str, Any] | None, target: float) -> str:
    points = [point for point in curve["points"] if point["target_kl"] == target] if curve else []
    return harness.percent(max(run["d_hidden"] for run in points[0]["seeds"])) if points else "–"


def _worst_error(records: Sequence[dict[str, Any] | None]) -> str:
    found = [harness.gradient_error(record) for record in records if record]
    return harness.percent(max((error for error in found if error is not None), default=None))


def _cell(row: dict[str, Any], record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    if record["status"] == "verified":
        return "not timed"
    if record["status"] != "measured":
        return record["status"].split(":")[0]
    undo = harness.contender(row, "undo-core")
    ratio = harness.ratio(record, undo)
    time = harness.seconds(harness.median(record))
    shown = [time if ratio is None or record is undo else harness.times(ratio)]
    floor = ceilings.of_floor(row, record)
    shown += [] if floor is None else [harness.share(floor)]
    extra = record.get("memory", {}).get("extra_bytes")
    shown += [] if extra is None or record["name"] == "products" else [harness.megabytes(extra)]
    shown += (
        [harness.percent(harness.gradient_error(record))] if "captured_loss" in row and record["name"] != "products" else []
    )
    return " · ".join(shown)


def _row_table(row: dict[str, Any]) -> str:
    undo, products = harness.contender(row, "undo-core"), harness.contender(row, "products")
    header = [
        _problem(row),
        "median",
        "fastest",
        "× undo-core",
        "× products",
        "of floor",
        "extra memory",
        "forward",
        "× undo-core",
        "of floor",
        "extra memory",
        "loss error",
        "dH error",
        "dW error",
    ]
    lines, notes = [], []
    for record in row["contenders"]:
        checked = record.get("verification") or {}
        remarks = [] if record["status"] == "measured" else [record["status"]]
        remarks += [f"{mode}: {harness.path(ran)}" for mode, ran in record.get("ran", {}).items() if ran]
        remarks += record["notes"]
        notes += [f"{record['label']}: {'; '.join(remarks)}"] if remarks else []
        samples = record.get("samples_s")
        lines.append(
            [
                record["label"],
                harness.seconds(harness.median(record)),
                harness.seconds(min(samples) if samples else None),
                harness.times(harness.ratio(record, undo)),
                harness.times(harness.ratio(record, products)),
                harness.share(ceilings.of_floor(row, record)),
                harness.megabytes(record.get("memory", {}).get("extra_bytes")),
                harness.seconds(harness.median(record, "forward")),
                harness.times(harness.ratio(record, undo, "forward")),
                harness.share(ceilings.of_floor(row, record, "forward")),
                harness.megabytes(record.get("forward_memory", {}).get("extra_bytes")),
                *(harness.percent(checked.get(key)) for key in ("loss", "d_hidden", "d_weight")),
            ]
        )
    made, again = row["provenance"], row.get("accuracy_provenance")
    when = (
        f"{row['rounds']} rounds, {made['threads']} threads, commit {made['commit']}, {made['when'][:10]}: `{made['command']}`"
    )
    rates = row.get("ceilings")
    if rates:
        when = f"{rates['flops'] / 1e9:,.0f} GFLOP/s and {rates['bytes_per_s'] / 1e9:,.1f} GB/s at best; {when}"
    if again and again != made:
        when += f"; errors: commit {again['commit']}, {again['when'][:10]}: `{again['command']}`"
    if "captured_loss" in row:
        when = f"Hidden states of {row['model']}, a true loss of {row['captured_loss']:.2g}; errors on them. {when}"
    return "\n\n".join([markdown(header, lines), *([". ".join(notes) + "."] if notes else []), when])


def _error_table(section: dict[str, Any]) -> str:
    targets = list(dict.fromkeys(point["target_kl"] for curve in section["curves"] for point in curve["points"]))
    header = ["relative error of dH at a true KL of", *(f"{target:g}" for target in targets)]
    lines = []
    for curve in section["curves"]:
        worst = [harness.percent(max(run["d_hidden"] for run in point["seeds"])) for point in curve["points"]]
        worst = worst or [curve["status"].split(":")[0], *("" for _ in targets[1:])]
        lines.append([f"{curve['label']}, {curve['dtype']}", *worst])
    rows = {curve["row"]: curve["tokens"] for curve in section["curves"] if curve["points"]}
    shapes = " and ".join(f"`{row}` ({tokens} tokens)" for row, tokens in rows.items())
    made = section["provenance"]
    when = f"commit {made['commit']}, {made['when'][:10]}: `{made['command']}`"
    return f"{markdown(header, lines)}\n\nWorst of {section['seeds']} seeds, in the shapes of {shapes}. {when}"


def _footer(results: dict[str, Any], source: str) -> str:
    where = harness.whereabouts(results["machine"])
    made = [row[key] for row in results["rows"] for key in ("provenance", "accuracy_provenance") if key in row]
    made += [section["provenance"] for section in [results.get("error_versus_kl")] if section]
    commands = list(dict.fromkeys(one["command"] for one in made))
    packages = results["rows"][0]["provenance"]["versions"] if results["rows"] else {}
    told = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "liger-kernel", "trl", "cut-cross-entropy") if packages.get(name)
    )
    ran = dict.fromkeys(
        harness.path(calls)
        for row in results["rows"]
        for record in row["contenders"]
        if record["name"] == "undo-core"
        for calls in [record.get("ran", record.get("verification", {}).get("ran", {})).get("both")]
        if calls
    )
    own = f" undo-core ran: {'; '.join(ran)}." if ran else ""
    note = f" {results['note']}" if "note" in results else ""
    return (
        f"{where}; {told}.{own}{note} From [`{source.rsplit('../', 1)[-1]}`]({source}), made by\n`{'` and `'.join(commands)}`."
    )


def rewrite(text: str, file: Path, given: dict[str, Path]) -> str:
    """Returns ``text`` of ``file`` with each block regenerated from ``given[suite]``, or from the results that it names."""

    def block(match: re.Match[str]) -> str:
        suite = match["suite"]
        named = SOURCE.search(match["body"])
        if suite not in given and named is None:
            raise SystemExit(f"{file}: the block bench:{suite} names no results yet; give its JSON file once")
        path = given.get(suite) or (file.parent / named[1]).resolve()
        results = json.loads(path.read_text())
        source = Path(os.path.relpath(path.resolve(), file.resolve().parent)).as_posix()
        return match[1] + render(results, source, bool(match["full"])) + match[5]

    return BLOCK.sub(block, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python bench/tables.py docs/benchmarks.md bench/results/kl-cpu/MACHINE-VERSION.json   write the block of these results
  python bench/tables.py docs/benchmarks.md                                             regenerate each block from its results
  python bench/tables.py docs/benchmarks.md --check                                     exit 1 if text and results differ""",
    )
    parser.add_argument("file", type=Path, help="Markdown file with markers")
    parser.add_argument(
        "results", type=Path, nargs="*", help="JSON files of the benchmarks (default: those named in the blocks)"
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if text and results differ")
    options = parser.parse_args(arguments)
    given = {json.loads(path.read_text())["suite"]: path for path in options.results}
    text = options.file.read_text()
    for suite in given:
        if not any(match["suite"] == suite for match in BLOCK.finditer(text)):
            parser.error(f"{options.file} has no lines <!-- bench:{suite} --> and <!-- /bench:{suite} -->")
    wanted = rewrite(text, options.file, given)
    if options.check:
        if wanted != text:
            print(f"{options.file}: tables differ from the results; python bench/tables.py {options.file} rewrites them")
        return int(wanted != text)
    if wanted != text:
        options.file.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
