"""Summaries of the smaller suites as Markdown: noise, RMU and the whole step. bench/tables.py writes them into documents."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import harness


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose first column is text."""
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def noise(results: dict[str, Any]) -> str:
    """Summarises the noise: million values per second, and memory beyond the parameters."""
    lines = []
    for row in results["rows"]:
        ours, torch = (harness.contender(row, name) for name in ("undo-core", "torch"))
        rates = (row["values"] / harness.median(record) / 1e6 for record in (ours, torch))
        extra = (harness.megabytes(record["memory"]["extra_bytes"]) for record in (ours, torch))
        times = harness.times(harness.ratio(torch, ours))
        lines.append([f"{row['law'].replace('_', '-')}, {row['dtype']}", *(f"{rate:,.0f}" for rate in rates), times, *extra])
    header = ["noise", "undo-core, M values/s", "torch, M values/s", "faster", "extra memory", "torch's extra memory"]
    said = (
        "`ops.noise_` beside `xavier_uniform_` (or `_normal_`), `mul_` and `add_` on every parameter of the published 0.1B "
        "model; bfloat16 with stochastic rounding, which torch's way does not have."
    )
    return f"{markdown(header, lines)}\n\n{said}"


def rmu(results: dict[str, Any]) -> str:
    """Summarises RMU: time and peak memory of a step and of the loss alone, beside the usual way."""
    lines = []
    for row in results["rows"]:
        ours, usual = (harness.contender(row, name) for name in ("undo-core", "usual"))
        memory = [record["memory"]["extra_bytes"] for record in (ours, usual)]
        if row["kind"] == "step":
            label = f"step, layers {row['first']} to {row['target'] - 1} of {row['layers']} trained"
        else:
            label = (
                f"loss, {row['tokens']:,} × {row['width']:,}, {row['dtype']}{', frozen activations' if row['frozen'] else ''}"
            )
        times = [harness.seconds(harness.median(record)) for record in (ours, usual)]
        share = f"{memory[0] / memory[1]:.2f}" if memory[1] else "–"
        checked = ours.get("verification", {})
        lines.append(
            [label, *times, harness.times(harness.ratio(usual, ours)), *map(harness.megabytes, memory), share]
            + [harness.percent(checked.get(part)) for part in ("loss", "gradient")]
        )
    header = ["RMU", "undo-core", "usual way", "faster", "peak memory", "usual peak", "of it", "loss error", "gradient error"]
    said = (
        "The usual way of a step: two models, every layer and the logits, a gradient and two moments for every parameter; of "
        "the loss: `mse_loss` in the same dtype. Errors: of a step against the usual way, of the loss against float64."
    )
    return f"{markdown(header, lines)}\n\n{said}"


def step(results: dict[str, Any]) -> str:
    """Summarises a whole distillation step in every mode."""
    (row,) = results["rows"]
    shape, (plain, *_) = row["shape"], row["contenders"]
    whole = plain["peak"] - plain["resident_before"]
    lines = []
    for record in row["contenders"]:
        seconds = statistics.median(record["samples_s"])
        extra = record["peak"] - record["resident_before"]
        lines.append(
            [
                record["label"],
                harness.seconds(seconds),
                harness.times(faster(record)),
                f"{shape['rows'] * (shape['length'] - 1) / seconds:,.0f}",
                harness.megabytes(extra),
                f"{extra / whole:.2f}",
                harness.megabytes(record["peak"]),
                accuracy(record),
                f"{record['loss']:.5f}",
            ]
        )
    header = [
        "mode",
        "step",
        "faster",
        "tokens/s",
        "peak beyond the loaded models",
        "of plain's",
        "peak of the process",
        "predicted / measured",
        "mean loss",
    ]
    said = (
        f"Gemma 2, {shape['layers']} layers, width {shape['width']}, {shape['vocabulary']:,} tokens, random weights; "
        f"{shape['rows']} × {shape['length'] - 1} tokens, AdamW included. *lean* and *leanest*: step in the backward pass, "
        "activation checkpointing, cached teacher. torchao's quantised moments are made for GPUs: on a CPU their step is slow."
    )
    return f"{markdown(header, lines)}\n\n{said}"


def faster(record: dict[str, Any]) -> float | None:
    """Returns the median over rounds of the plain loop's time over the mode's in the same round."""
    if not record.get("beside"):
        return None
    return statistics.median(plain / own for plain, own in zip(record["beside"], record["samples_s"], strict=True))


def accuracy(record: dict[str, Any]) -> str:
    """Returns the predicted peak over the measured one, both beyond the process; a dash if older results have none."""
    if record.get("predicted") is None:
        return "–"
    return f"{record['predicted'] / (record['peak'] - record['process']):.2f}"


SUMMARIES = {"noise-cpu": noise, "rmu-cpu": rmu, "step-cpu": step}
