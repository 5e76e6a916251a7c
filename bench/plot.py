"""The pictures of the recorded benchmarks: time and memory of every contender, and gradient error against KL."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from undo_core.report.figures import DPI, STYLE

# Okabe and Ito's colours, as in the pipeline's reports; undo-core is the blue.
COLOURS = {
    "undo-core": "#0072B2",
    "undo-core-workspace": "#56B4E9",
    "undo-core-lse": "#56B4E9",
    "undo-reference": "#9ecae1",
    "plain": "#5b5b5b",
    "compile": "#9a9a9a",
    "liger-chunked": "#D55E00",
    "liger-triton": "#D55E00",
    "trl": "#009E73",
    "products": "#d0d0d0",
}
MARKERS = {"undo-core": "o", "plain": "s", "compile": "x", "liger-chunked": "D", "liger-triton": "D", "trl": "^"}


def time(results: dict[str, Any]) -> Figure | None:
    """Bars of time over the time of the four bare products."""

    def value(row: dict[str, Any], record: dict[str, Any]) -> float | None:
        return harness.ratio(record, harness.contender(row, "products"))

    figure = _bars(
        results,
        value,
        lambda ratio: f"{ratio:.2f}×",
        "time over that of the four bare matrix products (dashed); tokens × vocabulary × width",
    )
    for axes in figure.axes if figure else ():
        axes.axvline(1, color="#222222", linewidth=1, linestyle=(0, (3, 2)), zorder=2.5)
    return figure


def memory(results: dict[str, Any]) -> Figure | None:
    """Bars of peak memory beyond inputs and gradients."""

    def value(row: dict[str, Any], record: dict[str, Any]) -> float | None:
        extra = record.get("memory", {}).get("extra_bytes")
        return None if extra is None else extra / 1e9

    return _bars(
        results,
        value,
        lambda count: harness.megabytes(count * 1e9),
        "peak memory beyond inputs and gradients, GB; tokens × vocabulary × width",
    )


def error(results: dict[str, Any]) -> Figure | None:
    """Relative error of dH against the true KL, worst seed."""
    section = results.get("error_versus_kl")
    curves = [curve for curve in section["curves"] if curve["points"]] if section else []
    if not curves:
        return None
    figure = Figure(figsize=(8.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    ends = []
    for curve in curves:
        xs = [max(run["kl"] for run in point["seeds"]) for point in curve["points"]]
        ys = [max(run["d_hidden"] for run in point["seeds"]) for point in curve["points"]]
        own, single, traced = curve["name"] == "undo-core", curve["dtype"] == "float32", curve["name"] == "compile"
        axes.plot(
            xs, ys, color=COLOURS[curve["name"]], marker=MARKERS[curve["name"]], markersize=5, zorder=4 if own else 3,
            linestyle=(0, (4, 1.5)) if single else (0, (1, 1)) if traced else "-", linewidth=2.6 if own and not single else 1.7,
        )  # fmt: skip
        ends.append((ys[-1], f"{curve['label']}, {curve['dtype']}", COLOURS[curve["name"]]))
    axes.set(
        xscale="log", yscale="log", xlabel="true KL(teacher ‖ student), nats", ylabel="relative error of the hidden gradient"
    )
    axes.invert_xaxis()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y * 100:g} %"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axhline(1, color="#222222", linewidth=1, linestyle=(0, (3, 2)), zorder=1)
    axes.annotate(
        "error as large as the gradient", (0.015, 1), xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points",
        fontsize=9, color="#444444",
    )  # fmt: skip
    _label_ends(axes, ends)
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names beside the right ends of lines on a logarithmic axis, moved apart where they would touch."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    gap = 0.06
    places = [[(math.log(value) - low) / (high - low), label, colour] for value, label, colour in sorted(ends)]
    for _ in range(200):
        for below, above in pairwise(places):
            push = (gap - (above[0] - below[0])) / 2
            if push > 0:
                below[0], above[0] = below[0] - push, above[0] + push
    for at, label, colour in places:
        axes.annotate(
            label, (1.015, at), xycoords="axes fraction", va="center", fontsize=9.5, color=colour, annotation_clip=False
        )  # fmt: skip


def _bars(
    results: dict[str, Any],
    value: Callable[[dict[str, Any], dict[str, Any]], float | None],
    show: Callable[[float], str],
    label: str,
) -> Figure | None:
    rows = [
        row for row in results["rows"] if any(value(row, r) is not None and r["name"] == "plain" for r in row["contenders"])
    ]
    if not rows:
        return None
    across = min(2, len(rows))
    down = math.ceil(len(rows) / across)
    most = max(len(row["contenders"]) for row in rows)
    figure = Figure(figsize=(5.0 * across, (0.31 * most + 0.85) * down + 0.2), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes, row in zip(grid.flat, rows, strict=False):
        shown = [record for record in row["contenders"] if record["name"] != "products"]
        values = [value(row, record) for record in shown]
        top = max(v for v in values if v is not None)
        for place, (record, v) in enumerate(zip(shown, values, strict=True)):
            own = record["name"] == "undo-core"
            axes.barh(place, v or 0, color=COLOURS[record["name"]], height=0.72)
            text = record["status"].split(":")[0] if v is None else show(v)
            axes.annotate(
                text, (v or 0, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9, zorder=5,
                color="#888888" if v is None else "#222222", fontweight="bold" if own else "normal",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8} if v is None else None,
            )  # fmt: skip
        axes.set_yticks(range(len(shown)), [record["label"] for record in shown], fontsize=9.5)
        for tick, record in zip(axes.get_yticklabels(), shown, strict=True):
            tick.set_fontweight("bold" if record["name"] == "undo-core" else "normal")
        axes.invert_yaxis()
        axes.set_xlim(0, top * 1.24)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        softcap = "" if row["softcap"] is None else f", softcap {row['softcap']:g}"
        axes.set_title(
            f"{row['tokens']:,} × {row['vocabulary']:,} × {row['width']}, {row['dtype']}{softcap}", loc="left"
        )  # fmt: skip
    for axes in list(grid.flat)[len(rows) :]:
        axes.set_visible(False)
    figure.supxlabel(label, fontsize=10.5)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python bench/plot.py bench/results/kl-cpu/MACHINE.json     writes docs/results/kl-cpu/{time,memory,error}.png",
    )
    parser.add_argument("results", type=Path, nargs="*", help="JSON files of bench_kl.py (default: all in bench/results/kl-*)")
    parser.add_argument("--out", type=Path, help="folder (default: docs/results/SUITE)")
    options = parser.parse_args(arguments)
    paths = options.results or sorted((harness.ROOT / "bench/results").glob("kl-*/*.json"))
    if not paths:
        parser.error("no results: run python bench/bench_kl.py first")
    for path in paths:
        results = json.loads(path.read_text())
        folder = options.out or harness.ROOT / "docs/results" / results["suite"]
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for draw in (time, memory, error):
                figure = draw(results)
                if figure is not None:
                    target = folder / f"{draw.__name__}.png"
                    figure.savefig(target, dpi=DPI, facecolor="white", metadata={"Software": None})
                    print(target)


if __name__ == "__main__":
    main()
