"""The fastest tile of a matrix kernel on this GPU, as a JSON object: ``python -m undo_kernels.triton.tuner loss float32 2304``.

Not used at run time: ``bench/gpu_suite.sh --part tune`` runs it, and the winners become the table in measured_tiles.py. A candidate
is valid if its results agree with the default tile's and it spills no registers. ``--first`` runs each candidate once, which
fills Triton's compilation cache: run several such processes in parallel, then the timings one by one. ``--rehearse`` times small
problems on a CPU with interpreted kernels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple
from typing import Any

import torch
import triton

from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton import tile_kernels, tile_table
from undo_kernels.triton.products import Workspace
from undo_kernels.triton.recompute import Recompute
from undo_kernels.triton.run import Run
from undo_kernels.triton.vocab_loss import INTERPRETED

TOKENS, VOCABULARY = 4096, 65536  # a hundred waves of tiles
WIDTHS = (320, 768, 2304)
REPEATS = 7
TARGETS = {"stats": "forward", "cross": "reverse", "loss": "forward", "jsd": "jsd"}  # of a problem that launches the kernel
_REGISTERS = 256  # a thread's; two tiles of float32 sums must leave room
_SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_TOLERANCE = {False: 1e-2, True: 1e-4}

# What a tile that cannot be launched raises; PTXASError is no RuntimeError.
_FAILURES = (
    triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.errors.CompilationError, RuntimeError,
)  # fmt: skip

Seconds = Callable[[Callable[[], Any]], float]


def candidates(target: str, wide: bool) -> Iterator[tile_table.Tile]:
    """Yields the tiles whose operands fit shared memory and whose sums fit registers."""
    if target == tile_table.INTERPRETER:
        yield from (tile_table.Tile(16, 64, 16, 4, 1, 2), tile_table.Tile(16, 32, 16, 4, 1, 2))
        return
    size = 4 if wide else 2
    if wide:
        shapes = itertools.product((64, 128), (64, 128), (16, 32), (8,), (2, 3), (2, 4, 8))
    else:
        shapes = itertools.product((64, 128), (64, 128, 256), (64,), (4, 8), (2, 3, 4), (2, 4, 8))
    for block_t, block_v, block_d, warps, stages, pieces in shapes:
        operands = stages * (block_t + block_v) * block_d * size
        threads = warps * (64 if target.startswith("gfx") else 32)
        columns = block_v // pieces
        if operands <= _SHARED[target] and 2 * block_t * block_v // threads < _REGISTERS and 16 <= columns <= 32:
            yield tile_table.Tile(block_t, block_v, block_d, warps, stages, pieces)


def problem(kernel: str, wide: bool, width: int, tokens: int, vocabulary: int, device: torch.device) -> Problem:
    """Returns a problem with logits of standard deviation 2 that needs the gradients of hidden states and weight."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if wide else torch.bfloat16

    def side() -> Projection:
        weight = torch.randn(vocabulary, width, generator=generator) * 2 / width**0.5
        hidden = torch.randn(tokens, width, generator=generator)
        return Projection(hidden.to(device, dtype), weight.to(device, dtype), softcap=30.0)

    factor = torch.full((tokens,), 1 / tokens, device=device)
    return Problem(side(), TARGETS[kernel], factor, teacher=side(), needs=(True, True, False), plan="recompute")


class Watched:
    """A kernel that records the largest number of register spills of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.spills = kernel, 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            compiled = self.kernel[grid](*arguments, **options)
            self.spills = max(self.spills, 0 if INTERPRETED else compiled.n_spills)

        return launch


def launcher(p: Problem, kernel: str) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """Returns a function that launches the kernel with the table's tile, and one that returns its output."""
    run = Run(p, Workspace(p.student.hidden.device))
    passes = Recompute(run)
    passes._statistics()
    passes.at_label = run.zero
    if kernel in ("stats", "cross"):
        return passes._statistics, lambda: torch.stack([run.per_token["lse_s"], run.per_token["lse_t"]])
    passes.dz.fill_(torch.nan)
    return lambda: passes._loss(0, True), lambda: passes.dz[:, : min(64, p.student.vocabulary)].float()


def tune(
    kernel: str,
    wide: bool,
    width: int,
    device: torch.device,
    seconds: Seconds,
    tokens: int = TOKENS,
    vocabulary: int = VOCABULARY,
    first: bool = False,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Any]:
    """Times every candidate; ``first``: only launches once every ``share[1]``-th candidate, from ``share[0]`` on.

    Returns:
        ``tried``, a list of tiles with their seconds or the reason why they are invalid, and ``best``, the fields of the
        fastest.
    """
    target = tile_table.target_of(device)
    p = problem(kernel, wide, width, tokens, vocabulary, device)
    key = (target, kernel, wide, width)
    names = ("stats_tiles",) if kernel in ("stats", "cross") else ("loss_tiles",)
    default = tile_table.tile(*key)
    launch, written = launcher(p, kernel)
    launch()
    wanted = written().clone()
    del launch, written
    tiles = list(dict.fromkeys([default, *candidates(target, wide)]))
    tried = []
    for tile in tiles[share[0] :: share[1]] if first else tiles:
        record: dict[str, Any] = {"tile": list(astuple(tile))}
        tried.append(record)
        watched = {name: Watched(getattr(tile_kernels, name)) for name in names}
        try:
            with tile_table.trial(key, tile):
                for name, stand_in in watched.items():
                    setattr(tile_kernels, name, stand_in)
                launch, written = launcher(p, kernel)
                launch()
                record |= {"spills": max(stand_in.spills for stand_in in watched.values()), "error": error(written(), wanted)}
                if record["spills"]:
                    record["failed"] = "spills"
                elif not record["error"] <= _TOLERANCE[wide]:
                    record["failed"] = "other numbers than the default tile's"
                elif not first:
                    record["seconds"] = seconds(launch)
        except _FAILURES as failure:
            said = str(failure).strip().partition("\n")[0]
            record["failed"] = f"{type(failure).__name__}: {said[:120]}"
        finally:
            for name, stand_in in watched.items():
                setattr(tile_kernels, name, stand_in.kernel)
            launch = written = None
    timed = [record for record in tried if "seconds" in record]
    best = min(timed, key=lambda record: record["seconds"])["tile"] if timed else None
    found = {"kernel": kernel, "wide": wide, "width": width, "target": target, "tokens": tokens, "vocabulary": vocabulary}
    return found | {"default": list(astuple(default)), "best": best, "tried": tried}


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def median_of_events(step: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Returns the median seconds between two events around a launch."""
    taken = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def seconds_of_clock(step: Callable[[], Any]) -> float:
    """Returns the seconds of one launch by the clock."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel", choices=list(TARGETS))
    parser.add_argument("dtype", choices=("bfloat16", "float32"))
    parser.add_argument("width", type=int)
    parser.add_argument("--first", nargs=2, type=int, metavar=("I", "N"), help="run every N-th candidate from the I-th once")
    parser.add_argument("--rehearse", action="store_true", help="small sizes under TRITON_INTERPRET=1")
    options = parser.parse_args()
    what = (options.kernel, options.dtype == "float32", options.width)
    if options.rehearse and INTERPRETED:
        found = tune(*what, torch.device("cpu"), seconds_of_clock, tokens=16, vocabulary=128)
    elif not torch.cuda.is_available():
        parser.error("got no GPU, wanted one, or --rehearse with TRITON_INTERPRET=1")
    elif options.first:  # sizes do not affect the compilation, except that they are multiples of 16
        share = tuple(options.first)
        found = tune(*what, torch.device("cuda", 0), median_of_events, tokens=256, vocabulary=8192, first=True, share=share)
    else:
        found = tune(*what, torch.device("cuda", 0), median_of_events)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
