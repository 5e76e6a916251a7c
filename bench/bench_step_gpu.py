"""Memory and speed of a distillation step on a GPU, in one mode a process: prints one JSON object.

Gemma 2 2B's shape, random weights, 10 x 1024 tokens by default, AdamW included. ``plain`` is the transformers and torch loop in
float32, at the largest batch that fits the GPU, or ``--limit-gb`` of it; its teacher is float32 too. The other modes' teachers
are bfloat16 where their students are. Peak: torch's allocator over all steps, models included; the first step is no part of the
time.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench_step import Shape, plain_loop
from contenders import observed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from undo_core import CachedTeacher, TrainConfig, cache_teacher, distill, noise_
from undo_core.data.sequences import Sequences
from undo_core.models import attention_of, head_of

GEMMA_2B = Shape(layers=26, width=2304, inner=9216, heads=8, key_value_heads=4, head_dim=256, rows=10, length=1025)
QUICK = Shape(layers=2, width=32, inner=64, heads=2, key_value_heads=1, head_dim=16, vocabulary=3000, rows=4, length=65)
LEAN = {"step_in_backward": True, "activation_checkpointing": True, "precision": "bfloat16-stochastic"}


@dataclass(frozen=True)
class Mode:
    """One way to take the step; its wanted peak, in GB, at the default shape."""

    train: dict[str, Any] = field(default_factory=dict)
    cached: bool = False
    within_gb: float | None = None


MODES = {
    "plain": Mode(),
    "float32": Mode(),
    "checkpointing": Mode({"activation_checkpointing": True}),
    "in-backward": Mode({"step_in_backward": True, "activation_checkpointing": True}),
    "lean-stochastic": Mode(LEAN),
    "in-backward-8bit": Mode({**LEAN, "optimizer": "adamw-8bit"}, within_gb=24.0),
    "leanest": Mode({**LEAN, "optimizer": "adamw-4bit"}, cached=True, within_gb=16.0),
}


class Clocked(Sequences):
    """Sequences that note when each step asks for its batch, and hand it over on the device."""

    device = torch.device("cpu")

    def order(self, step: int, size: int, seed: int) -> torch.Tensor:
        self.noted.append(moment(self.device))
        return super().order(step, size, seed)

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        return super().batch(step, size, seed).to(self.device)


def moment(device: torch.device) -> float:
    """Now, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def build(shape: Shape, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The same weights at every call, drawn on the device."""
    config = AutoConfig.for_model(
        "gemma2", num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=shape.inner,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, head_dim=shape.head_dim,
        query_pre_attn_scalar=256, vocab_size=shape.vocabulary,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention_of(config), dtype=dtype)


def draw(shape: Shape, rows: int, steps: int, device: torch.device) -> Clocked:
    ids = torch.randint(1, shape.vocabulary, (rows * steps, shape.length), generator=torch.Generator().manual_seed(1))
    drawn = Clocked(ids.to(torch.int32), pad_id=0)
    drawn.device, drawn.noted = device, []
    return drawn


def measure(name: str, shape: Shape, steps: int, rows: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """One mode at one batch."""
    mode = MODES[name]
    dtype = torch.bfloat16 if mode.train.get("precision", "float32") != "float32" else torch.float32
    text = draw(shape, rows, steps, device)
    teacher: Any = build(shape, dtype, device).eval().requires_grad_(False)
    if mode.cached:
        cache_teacher(teacher, Sequences(text.input_ids, pad_id=0), folder, progress=False)
        teacher = CachedTeacher.open(folder, head_of(teacher))
    student = build(shape, dtype, device)
    noise_(student, alpha=0.6, beta=0.1, seed=0)
    config = TrainConfig(steps=steps, batch_size=rows, lr=1e-4, seed=0, **mode.train)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if name == "plain":
        loss, ran = observed(lambda: plain_loop(student, teacher, text, config))
    else:
        loss, ran = observed(lambda: distill(student, teacher, text, config, progress=False).history[-1]["loss"])
    stamps = [*text.noted[-steps:], moment(device)]
    seconds = statistics.median(b - a for a, b in itertools.pairwise(stamps[1:]))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    tokens = rows * (shape.length - 1)
    speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"rows": rows, "loss": loss, **speed, "peak_bytes": peak, "ran": {"both": ran}}


def largest(rows: int, run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
    """The result at the largest batch of rows, rows / 2, ... that fits."""
    refused = []
    while rows:
        try:
            return run(rows) | {"too_large": refused}
        except torch.OutOfMemoryError:
            refused.append(rows)
        gc.collect()
        torch.cuda.empty_cache()
        rows //= 2
    return {"rows": 0, "too_large": refused}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(MODES), required=True)
    parser.add_argument("--steps", type=int, default=5, help="the first is a warm-up (%(default)s)")
    parser.add_argument("--limit-gb", type=float, help="memory that the process may take; wants a GPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on the CPU where there is no GPU")
    options = parser.parse_args(arguments)
    if options.steps < 3:
        parser.error(f"--steps: got {options.steps}, wanted at least 3")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and (options.limit_gb or not options.quick):
        parser.error("got a torch that sees no GPU, wanted one that does")
    if options.limit_gb:
        share = options.limit_gb * 1e9 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0))
    shape, mode = QUICK if options.quick else GEMMA_2B, MODES[options.mode]
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:

        def run(rows: int) -> dict[str, Any]:
            return measure(options.mode, shape, options.steps, rows, device, Path(name) / "cache")

        found = largest(shape.rows, run) if options.mode == "plain" else run(shape.rows)
    found |= {"mode": options.mode, "steps": options.steps, "limit_gb": options.limit_gb, "within_gb": mode.within_gb}
    print(json.dumps(found))
    return int(mode.within_gb is not None and not options.quick and found["peak_bytes"] > mode.within_gb * 1e9)


if __name__ == "__main__":
    raise SystemExit(main())
