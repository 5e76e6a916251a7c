"""Predicted milliseconds of the loss's plans on an H200 at the three target shapes, with the arithmetic behind them.

    python bench/predictions.py             prints tables
    python bench/predictions.py --write     puts them into docs/findings/gpu-epilogue.md

8,192 tokens, a vocabulary of 256,000, bfloat16, softcap 30, forward KL, all gradients. ``before``: the same model
(kernels/undo_kernels/triton/costs.py) with the kernels as they were before the change of the epilogue: the instructions in
bench/results/instructions/before-3.9.json, their tiles, a loop for each side's products, and 1,024 tokens a chunk. ``old model``:
what chose plans then, which added products and bytes and knew no instructions. Needs no GPU and no Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from unittest import mock

import harness
import torch
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton import costs, plan, tile_table
from undo_kernels.triton.plan import GpuPlan, gpu_plan

TOKENS, VOCABULARY, WIDTHS = 8192, 256_000, (2304, 768, 320)
PAGE = harness.ROOT / "docs" / "findings" / "gpu-epilogue.md"
BEFORE = harness.ROOT / "bench" / "results" / "instructions" / "before-3.9.json"
TARGETS = {(2304, False): "70", (768, False): "30", (320, False): "22", (320, True): "16"}  # milliseconds
# The form of each kernel of the cost model among the recorded ones; the row kernel of one side was recorded with a mask alone.
FORMS = {
    "stats_rows": "stats_rows teacher capped_s capped_t 2048 8 warps fp32",
    "stats_rows known": "stats_rows bias_s capped_s bias_t capped_t masked holes 2048 8 warps fp32",
    "loss_rows": "loss_rows forward gradient capped_s capped_t 2048 8 warps fp32 to bf16",
    "stats_tiles": "stats_tiles teacher capped_s capped_t 64x256x64 8 warps bf16",
    "stats_tiles known": "stats_tiles capped_s capped_t 64x256x64 8 warps bf16",
    "loss_tiles": "loss_tiles forward gradient capped_s capped_t 128x128x64 8 warps bf16 to bf16",
}
OLD_LIBRARY, OLD_TILES = 790e12, 510e12  # FLOP/s in the old model


def problem(width: int, name: str, known: bool) -> Problem:
    """The target shape, on tensors without memory."""
    with torch.device("meta"):

        def side() -> Projection:
            hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16) for n in (TOKENS, VOCABULARY))
            return Projection(hidden, weight, softcap=30.0)

        token = torch.empty(TOKENS)
        lse_t = token if known else None
        return Problem(side(), "forward", token, teacher=side(), lse_t=lse_t, needs=(True, True, False), plan=name)


@contextlib.contextmanager
def kernels_before() -> Iterator[None]:
    """Makes the cost model see the kernels of before the change."""
    counts = json.loads(BEFORE.read_text())["targets"]["sm_90"]
    measured = {(name, False): (counts[form]["instructions"], counts[form]["special"]) for name, form in FORMS.items()}
    tiles = {("sm_90", "stats", False): tile_table.Tile(64, 256, 64, 8, 3, 8)}
    with (
        mock.patch.dict(costs.INSTRUCTIONS, measured),
        mock.patch.dict(tile_table.TILES, tiles),
        mock.patch.object(plan, "_CHUNK_TOKENS", (1024, 1024)),
        mock.patch.object(tile_table, "together", return_value=False),
    ):
        yield


def predicted(width: int, name: str, known: bool) -> GpuPlan:
    return gpu_plan(problem(width, name, known), "sm_90")


def old_model(found: GpuPlan, width: int) -> float:
    """Returns seconds as the old model predicted them."""
    library = found.flops if found.name == "chunk" else 4.0 * TOKENS * VOCABULARY * width
    return library / OLD_LIBRARY + (found.flops - library) / OLD_TILES + found.traffic_bytes / costs.BANDWIDTH


def cells(values: list[float]) -> str:
    return " / ".join(f"{1e3 * value:.0f}" for value in values)


def table() -> str:
    """Totals of both plans."""
    lines = [
        "| width | `teacher_lse` | old model, chunk / recompute | kernels before | kernels now | target | plan taken |",
        "| ---: | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    plans = ("chunk", "recompute")
    for width in WIDTHS:
        for known in (False, True):
            now = [predicted(width, name, known) for name in plans]
            with kernels_before():
                before = [predicted(width, name, known) for name in plans]
            columns = [[old_model(p, width) for p in before], [p.seconds for p in before], [p.seconds for p in now]]
            taken = predicted(width, "auto", known)
            about = f"{taken.name}, {taken.workspace_bytes / 1e9:.1f} GB"
            target = TARGETS.get((width, known), "")
            words = [f"{width:,}", "yes" if known else "no", *map(cells, columns), target, about]
            lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


def steps(name: str, known: bool) -> str:
    """Steps of a plan at each width, before → now."""
    found = {}
    for width in WIDTHS:
        with kernels_before():
            before = predicted(width, name, known)
        found[width] = (before, predicted(width, name, known))
    tokens = [f"{a.rows_per_chunk:,} → {b.rows_per_chunk:,}" for a, b in found.values()]
    lines = [
        f"| {name}{', teacher_lse' * known} | {' | '.join(f'{w:,}' for w in WIDTHS)} |",
        "| --- |" + " ---: |" * len(WIDTHS),
    ]
    lines += [f"| tokens a chunk | {' | '.join(tokens)} |"] * (name == "chunk")
    for step in dict.fromkeys(step for pair in found.values() for p in pair for step in p.steps):
        both = [[1e3 * p.steps.get(step, 0.0) for p in pair] for pair in found.values()]
        lines.append(f"| {step} | {' | '.join(f'{a:.1f} → {b:.1f}' for a, b in both)} |")
    totals = [[1e3 * p.seconds for p in pair] for pair in found.values()]
    return "\n".join([*lines, f"| together | {' | '.join(f'{a:.1f} → {b:.1f}' for a, b in totals)} |"])


def arithmetic() -> str:
    """Milliseconds of each kernel's instructions, before → now, beside what a pair of the target shape costs."""
    pairs = float(TOKENS * VOCABULARY)
    one, special = (pairs / (costs.SMS * costs.CLOCK) / rate * 1e3 for rate in (4 * 32, 16))
    lines = [
        f"{TOKENS:,} x {VOCABULARY:,} pairs: an instruction {one:.3f} ms, a special-function instruction {special:.2f} ms, a byte "
        f"{pairs / costs.BANDWIDTH * 1e3:.2f} ms",
        "",
        "| kernel | instructions a pair | special | ms of instructions | ms of special functions |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]

    def both(get: Callable[[tuple[float, float]], float], old: tuple[float, float], new: tuple[float, float]) -> str:
        return f"{get(old):.1f} → {get(new):.1f}"

    for name in FORMS:
        new = costs.INSTRUCTIONS[name, False]
        with kernels_before():
            old = costs.INSTRUCTIONS[name, False]
        parts = [
            both(get, old, new) for get in (lambda c: c[0], lambda c: c[1], lambda c: c[0] * one, lambda c: c[1] * special)
        ]
        lines.append(f"| {name} | {' | '.join(parts)} |")
    return "\n".join(lines)


def block() -> str:
    """All tables."""
    parts = [table(), arithmetic(), *(steps(name, known) for name in ("chunk", "recompute") for known in (False, True))]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(harness.with_block(PAGE.read_text(), "predictions", block()))
    else:
        print(block())


if __name__ == "__main__":
    main()
