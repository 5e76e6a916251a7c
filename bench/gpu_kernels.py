"""Milliseconds of each kernel of a loss beside what the cost model predicts, and of the library's products on the same shapes.

    python bench/gpu_kernels.py plans 768       both plans, with and without the teacher's log-sum-exps
    python bench/gpu_kernels.py products        the products of the chunk plan, 1,024 to 4,096 tokens, by dtype of the result
    python bench/gpu_kernels.py once 768        one launch of each kernel, for a profiler of hardware counters

8,192 tokens, a vocabulary of 256,000, bfloat16, softcap 30. Data are random: products of ones take less power and run faster.
Prints what it has as a line of JSON after each measurement. One that fails is an entry that says so. ``--rehearse`` runs everything on small sizes, also without a GPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton import vocab_loss
from undo_kernels.triton.plan import gpu_plan
from undo_kernels.triton.products import Workspace
from undo_kernels.triton.tuner import median_of_events, seconds_of_clock

REPEATS = 5
SHAPE, REHEARSAL = (8192, 256_000), (16, 256)
ONE_CHUNK = 1024  # tokens that every chunk plan takes in one chunk


def problem(width: int, plan: str, device: torch.device, tokens: int, vocabulary: int) -> Problem:
    """Forward KL of two heads with logits of standard deviation 2; all gradients."""
    generator = torch.Generator(device).manual_seed(0)

    def side() -> Projection:
        hidden, weight = (torch.randn(n, width, generator=generator, device=device) for n in (tokens, vocabulary))
        return Projection(hidden.bfloat16(), (weight * 2 / width**0.5).bfloat16(), softcap=30.0)

    factor = torch.full((tokens,), 1 / tokens, device=device)
    return Problem(side(), "forward", factor, teacher=side(), needs=(True, True, False), plan=plan)


def median_seconds(step: Callable[[], Any], device: torch.device) -> float:
    """Median of a few runs after one that is not counted."""
    step()
    return median_of_events(step, REPEATS) if device.type == "cuda" else seconds_of_clock(step)


def kernel_milliseconds(step: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of each kernel (on a CPU, of each operator) of one run, the longest first."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    taken: dict[str, float] = {}
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        taken[event.key[:100]] = taken.get(event.key[:100], 0.0) + spent / 1e3
    return {name: round(value, 4) for name, value in sorted(taken.items(), key=lambda item: -item[1])[:20]}


def attempt(about: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns an entry with what was measured, or with ``failed``: the errors of compilers and libraries share no class."""
    try:
        return about | measure()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return about | {"failed": f"{type(error).__name__}: {lines[0][:300]}"}


def plans(width: int, device: torch.device, tokens: int, vocabulary: int) -> Iterator[dict[str, Any]]:
    """Yields both plans, with and without the teacher's log-sum-exps."""
    p = problem(width, "chunk", device, tokens, vocabulary)
    lse_t = torch.cat([torch.logsumexp(_logits(p.teacher, part), 1) for part in torch.arange(tokens, device=device).split(512)])

    def measure(given: Problem) -> dict[str, Any]:
        chosen = gpu_plan(given, "sm_90")

        def step() -> Any:
            return vocab_loss.run(given, Workspace(device))

        return {
            "tokens_per_chunk": chosen.rows_per_chunk, "ms": median_seconds(step, device) * 1e3,
            "predicted_ms": chosen.seconds * 1e3,
            "predicted_steps_ms": {name: value * 1e3 for name, value in chosen.steps.items()},
            "kernels_ms": kernel_milliseconds(step, device), "workspace_bytes": chosen.workspace_bytes,
        }  # fmt: skip

    for plan in ("chunk", "recompute"):
        for known in (False, True):
            given = replace(p, plan=plan, lse_t=lse_t if known else None)
            yield attempt({"width": width, "plan": plan, "teacher_lse": known}, lambda given=given: measure(given))


def _logits(side: Projection, part: torch.Tensor) -> torch.Tensor:
    """Returns the logits of some tokens in float32, by torch."""
    z = side.hidden[part].float() @ side.weight.T.float()
    return side.softcap * torch.tanh(z / side.softcap)


def products(
    device: torch.device, vocabulary: int, widths: tuple[int, ...], counts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    """Yields the FLOP/s of the chunk plan's products: logits, hidden gradient and weight gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    def measure(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
        if device.type == "cpu":  # no product of a CPU has another dtype of the result
            a, b = a.to(dtype), b.to(dtype)
        out = torch.empty(a.shape[0], b.shape[1], device=device, dtype=dtype)
        options = {"out_dtype": dtype} if dtype != a.dtype else {}
        seconds = median_seconds(lambda: torch.mm(a, b, out=out, **options), device)
        return {"ms": seconds * 1e3, "flops": 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / seconds}

    for width in widths:
        weight = normal(vocabulary, width)
        for tokens in counts:
            hidden, gradient = normal(tokens, width), normal(tokens, vocabulary)
            for name, a, b in (
                ("logits", hidden, weight.T), ("hidden gradient", gradient, weight), ("weight gradient", gradient.T, hidden),
            ):  # fmt: skip
                for dtype in (torch.bfloat16, torch.float32):
                    about = {"product": name, "width": width, "tokens": tokens, "out": str(dtype)}
                    yield attempt(about, lambda a=a, b=b, dtype=dtype: measure(a, b, dtype))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plans", "products", "once"))
    parser.add_argument("width", type=int, nargs="?", default=768)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on a CPU where there is no GPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (options.rehearse and vocab_loss.INTERPRETED):
        parser.error("got no GPU, wanted one, or --rehearse with TRITON_INTERPRET=1")
    tokens, vocabulary = REHEARSAL if options.rehearse else SHAPE
    width = 32 if options.rehearse else options.width
    if options.what == "once":
        for plan in ("chunk", "recompute"):
            vocab_loss.run(problem(width, plan, device, min(tokens, ONE_CHUNK), vocabulary), Workspace(device))
        print(json.dumps({"ran": ["chunk", "recompute"]}))
        return
    if options.what == "plans":
        entries = plans(width, device, tokens, vocabulary)
    else:
        shapes = ((32,), (16,)) if options.rehearse else ((320, 768, 2304), (1024, 1536, 1792, 2048, 3072, 4096))
        entries = products(device, vocabulary, *shapes)
    found: list[dict[str, Any]] = []
    for entry in entries:
        found.append(entry)
        print(json.dumps({options.what: found}), flush=True)


if __name__ == "__main__":
    main()
