"""Draws the recorded benchmarks: time, memory, both against each size, a roofline, and gradient error against KL."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ceilings
import harness
import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from undo_core.report.style import DPI, STYLE

# Okabe and Ito's colours, as in the pipeline's reports; undo-core is blue.
COLOURS = {
    "undo-core": "#0072B2",
    "undo-core-workspace": "#56B4E9",
    "undo-core-lse": "#56B4E9",
    "undo-reference": "#9ecae1",
    "plain": "#5b5b5b",
    "compile": "#9a9a9a",
    "auto-chunker": "#F0E442",
    "liger-chunked": "#D55E00",
    "liger-triton": "#D55E00",
    "liger-kl": "#E69F00",
    "liger": "#D55E00",
    "torch-chunked": "#CC79A7",
    "trl": "#009E73",
    "cce": "#E69F00",
    "products": "#d0d0d0",
}
MARKERS = {
    "undo-core": "o",
    "plain": "s",
    "compile": "x",
    "auto-chunker": "+",
    "liger-chunked": "D",
    "liger-triton": "D",
    "liger": "D",
    "liger-kl": "v",
    "torch-chunked": "P",
    "trl": "^",
    "cce": "v",
    "products": "_",
}
SIZES = {"tokens": "tokens", "width": "width", "vocabulary": "vocabulary"}


def time(results: dict[str, Any]) -> Figure | None:
    """Draws bars of time over the time of the bare products."""

    def value(row: dict[str, Any], record: dict[str, Any]) -> float | None:
        return harness.ratio(record, harness.contender(row, "products"))

    figure = _bars(
        results,
        value,
        lambda ratio: f"{ratio:.2f}×",
        "time over that of the bare matrix products (dashed); tokens × vocabulary × width",
    )
    for axes in figure.axes if figure else ():
        axes.axvline(1, color="#222222", linewidth=1, linestyle=(0, (3, 2)), zorder=2.5)
    return figure


def memory(results: dict[str, Any]) -> Figure | None:
    """Draws bars of peak memory beyond inputs and gradients."""

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
    """Draws the relative error of dH against the true KL, of the worst seed."""
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


def scaling(results: dict[str, Any]) -> Figure | None:
    """Draws time and peak memory against each size in which at least three rows differ and agree otherwise."""
    sweeps = {size: rows for size in SIZES if len(rows := _sweep(results, size)) >= 3}
    if not sweeps:
        return None
    figure = Figure(figsize=(3.4 * len(sweeps) + 0.6, 5.6), layout="constrained")
    grid = figure.subplots(2, len(sweeps), squeeze=False, sharey="row")
    for column, (size, rows) in enumerate(sweeps.items()):
        fixed = [f"{name} {rows[0][name]:,}" for name in SIZES if name != size]
        grid[0][column].set_title(", ".join([*fixed, rows[0]["dtype"]]), loc="left", fontsize=9.5)
        for axes, value in ((grid[0][column], _milliseconds), (grid[1][column], _extra)):
            for name in dict.fromkeys(record["name"] for row in rows for record in row["contenders"]):
                records = [harness.contender(row, name) for row in rows]
                points = [
                    (row[size], found) for row, r in zip(rows, records, strict=True) if r and (found := value(r)) is not None
                ]
                if points and not (name == "products" and value is _extra):
                    label = next(r["label"] for r in records if r)
                    own = name == "undo-core"
                    axes.plot(
                        *zip(*points, strict=True), color=COLOURS[name], marker=MARKERS.get(name, "o"), markersize=5, label=label,
                        linewidth=2.6 if own else 1.5, zorder=4 if own else 3,
                    )  # fmt: skip
            axes.set(xscale="log", yscale="log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([row[size] for row in rows], [harness.short(row[size]) for row in rows])
        grid[1][column].set_xlabel(size)
    grid[0][0].set_ylabel("forward and backward, ms")
    grid[1][0].set_ylabel("extra memory, MB")
    for axes in grid[:, 0]:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    figure.get_layout_engine().set(w_pad=0.1)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=9.5)
    return figure


def _sweep(results: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Returns the largest set of rows that differ only in ``size``, sorted by it."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in results["rows"]:
        if "captured_loss" not in row:
            fixed = tuple(row[name] for name in SIZES if name != size)
            groups.setdefault((*fixed, row["dtype"], row["softcap"]), {})[row[size]] = row
    rows = max(groups.values(), key=len, default={})
    return [rows[value] for value in sorted(rows)]


def _milliseconds(record: dict[str, Any]) -> float | None:
    taken = harness.median(record)
    return None if taken is None else taken * 1e3


def _extra(record: dict[str, Any]) -> float | None:
    extra = record.get("memory", {}).get("extra_bytes")
    return extra / 1e6 if extra else None


def roofline(results: dict[str, Any]) -> Figure | None:
    """Draws needed FLOPs over time against needed FLOPs over needed bytes, under the ceilings of the same runs, by dtype."""
    measured = [row for row in results["rows"] if "ceilings" in row]
    dtypes = list(dict.fromkeys(row["dtype"] for row in measured))
    if not measured:
        return None
    figure = Figure(figsize=(4.8 * len(dtypes) + 0.4, 4.6), layout="constrained")
    shown: dict[str, Any] = {}
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False, sharey=True)[0], dtypes, strict=True):
        rows = [row for row in measured if row["dtype"] == dtype]
        rate, bandwidth = (max(row["ceilings"][key] for row in rows) for key in ("flops", "bytes_per_s"))
        spots = [ceilings.intensity(row) for row in rows]
        ridge = rate / bandwidth
        xs = [min(*spots, ridge) / 3, ridge, max(*spots, ridge) * 3]
        axes.plot(xs, [min(rate, bandwidth * x) / 1e9 for x in xs], color="#222222", linewidth=1.5, zorder=2)
        axes.annotate(
            f"products: {rate / 1e9:,.0f} GFLOP/s", (xs[-1], rate / 1e9), xytext=(-2, 4), textcoords="offset points", ha="right",
            fontsize=9, color="#444444",
        )  # fmt: skip
        axes.annotate(
            f"copy: {bandwidth / 1e9:,.0f} GB/s", (xs[0], bandwidth * xs[0] / 1e9), xytext=(8, 0), textcoords="offset points",
            va="center", fontsize=9, color="#444444",
        )  # fmt: skip
        for row in rows:
            for record in row["contenders"]:
                value, name = ceilings.achieved(row, record), record["name"]
                if value is not None and name not in ("undo-core-workspace", "undo-reference"):
                    own, label = name == "undo-core", record["label"]
                    shown[label] = axes.scatter(
                        ceilings.intensity(row), value / 1e9, color=COLOURS[name], marker=MARKERS.get(name, "o"),
                        s=46 if own else 30, zorder=4 if own else 3,
                    )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="owed FLOP for each owed byte")
        axes.set_title(dtype, loc="left")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    figure.axes[0].set_ylabel("owed GFLOP/s, forward and backward")
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2 * len(dtypes), frameon=False, fontsize=9.5)
    return figure


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Writes names beside the right ends of lines on a logarithmic axis, moved apart where they would touch."""
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
        row
        for row in harness.summary_rows(results)
        if any(value(row, r) is not None and r["name"] == "plain" for r in row["contenders"])
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
    figure.supxlabel(label if across > 1 else label.replace("; ", "\n"), fontsize=10.5)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python bench/plot.py bench/results/kl-cpu/MACHINE-VERSION.json   writes docs/results/kl-cpu/*.png",
    )
    parser.add_argument(
        "results", type=Path, nargs="*", help="JSON files (default: this machine's of bench_kl.py and bench_cross_entropy.py)"
    )
    parser.add_argument("--out", type=Path, help="folder (default: docs/results/SUITE)")
    options = parser.parse_args(arguments)
    # Figures of another machine would overwrite these.
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    own = [harness.results_path(suite, device) for suite in ("kl", "cross-entropy") for device in devices]
    paths = options.results or [path for path in own if path.exists()]
    if not paths:
        parser.error("no results: run python bench/bench_kl.py first")
    for path in paths:
        results = json.loads(path.read_text())
        folder = options.out or harness.ROOT / "docs/results" / results["suite"]
        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            for draw in (time, memory, scaling, roofline, error):
                figure = draw(results)
                if figure is not None:
                    figure.suptitle(harness.whereabouts(results["machine"]), x=0.99, ha="right", fontsize=8.5, color="#666666")
                    target = folder / f"{draw.__name__}.png"
                    figure.savefig(target, dpi=DPI, facecolor="white", metadata={"Software": None})
                    print(target)


if __name__ == "__main__":
    main()
