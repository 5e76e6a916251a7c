"""Compares a whole distillation step, optimizer included, in every mode of training with a plain loop of transformers and
torch.

Each contender is a separate process that loads its models, waits, and takes one step whenever it is told to. In every round the
plain loop and each mode take one step, so a slow minute of the machine affects all of them. A contender's peak memory is the
high-water mark over all steps less what was resident when its models were loaded; the prediction of ``undo plan`` is recorded
beside it. The student is the teacher after UNDO's noise (alpha 0.6, beta 0.1). All contenders read the same sequences of random
tokens. The recorded loss is the mean over the steps.

The model is the published 0.1B one by default: Gemma 2, 14 layers, width 320, 256,000 tokens, random weights. Prints a table;
results go to bench/results/step-cpu/MACHINE-VERSION.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
from rich.console import Console
from rich.table import Table
from summaries import accuracy, faster

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the batch."""

    layers: int = 14
    width: int = 320
    inner: int = 1280
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 256_000
    rows: int = 1
    length: int = 513  # 512 positions with a label


@dataclass(frozen=True)
class Mode:
    """A way to take the step.

    Attributes:
        label: name in tables.
        train: settings of undo-core's training loop.
        teacher: resident or cached.
        loop: None for undo-core's training loop. Otherwise the step is taken in a loop of transformers and torch: ``logits`` without
            undo-core, ``op`` with its loss, ``in place`` with the loss, ``tied_gradient_in_place`` and ``accumulate_into``.
    """

    label: str
    train: dict[str, Any] = field(default_factory=dict)
    teacher: str = "resident"
    loop: str | None = None


LEAN = {"step_in_backward": True, "activation_checkpointing": True}
MODES = {
    "plain": Mode("transformers + torch", loop="logits"),
    "op": Mode("the same loop, undo-core's loss", loop="op"),
    "in-place": Mode("the same loop, loss and gradients in place", loop="in place"),
    "float32": Mode("float32"),
    "checkpointing": Mode("float32, checkpointing", {"activation_checkpointing": True}),
    "in-backward": Mode("float32, step in backward", {"step_in_backward": True}),
    "master": Mode("bfloat16, float32 masters", {"precision": "bfloat16-master"}),
    "stochastic": Mode("bfloat16, stochastic", {"precision": "bfloat16-stochastic"}),
    "8bit": Mode("float32, 8-bit moments", {"optimizer": "adamw-8bit"}),
    "cached": Mode("float32, cached teacher", {}, "cached"),
    # the lean modes: step in the backward pass, activation checkpointing, cached teacher
    "lean-float32": Mode("lean: float32", LEAN, "cached"),
    "lean-stochastic": Mode("lean: bfloat16, stochastic", {**LEAN, "precision": "bfloat16-stochastic"}, "cached"),
    "lean": Mode("lean: float32, 8-bit moments", {**LEAN, "optimizer": "adamw-8bit"}, "cached"),
    "leanest": Mode(
        "leanest: bfloat16, 4-bit moments", {**LEAN, "precision": "bfloat16-stochastic", "optimizer": "adamw-4bit"}, "cached"
    ),
}


# -- a worker ------------------------------------------------------------------------------------------------------------------


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def worker(name: str, shape: Shape, steps: int, folder: Path) -> None:
    """Loads the models, then takes a step for each line on standard input."""
    import torch
    from contenders import observed

    from undo_core.data.sequences import Sequences
    from undo_core.distillation.cache import CachedTeacher
    from undo_core.distillation.student import distill
    from undo_core.distillation.teacher import ModelTeacher
    from undo_core.models import load_model
    from undo_core.training import TrainConfig

    class Paced(Sequences):
        def order(self, step: int, size: int, seed: int) -> torch.Tensor:
            wait(step)
            return super().order(step, size, seed)

    def wait(step: int) -> None:
        say(ready=step)
        sys.stdin.readline()

    mode = MODES[name]
    process = harness.status("VmRSS")
    sequences = Sequences.load(folder / "sequences.safetensors")
    paced = Paced(sequences.input_ids, sequences.pad_id, lengths=sequences.lengths)
    student = load_model(folder / "student")
    cached = mode.teacher == "cached"
    teacher = CachedTeacher.open(folder / "cache", folder / "teacher") if cached else load_model(folder / "teacher")
    config = TrainConfig(steps=steps, batch_size=shape.rows, micro_batch_size=1, lr=1e-4, seed=0, **mode.train)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = harness.status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if mode.loop is not None:
        loss, ran = observed(lambda: plain_loop(student, teacher, paced, config, mode.loop))
    else:
        known = teacher if cached else ModelTeacher(teacher)
        loss, ran = observed(lambda: distill(student, known, paced, config, progress=False).history[-1]["loss"])
    say(loss=loss, process=process, resident=before, peak=harness.status("VmHWM"), ran=ran)


def plain_loop(student: Any, teacher: Any, sequences: Any, config: Any, kind: str) -> float:
    """Distillation as one would write it with transformers and torch; each sequence is a micro-batch."""
    import torch

    from undo_core import tied_gradient_in_place

    optimizer = torch.optim.AdamW(student.parameters(), lr=config.lr, weight_decay=0.0)
    loss_of = logits_loss if kind == "logits" else op_loss
    into = student.get_output_embeddings().weight if kind == "in place" else None
    total = 0.0
    with tied_gradient_in_place(student) if kind == "in place" else contextlib.nullcontext():
        for step in range(config.steps):
            batch = sequences.batch(step, config.batch_size, config.seed)
            student.train()
            for ids in batch.split(1):
                loss = loss_of(student, teacher, ids[:, :-1], into) / len(batch)
                loss.backward()
                total += float(loss.detach())
                del loss
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
    return total / config.steps


def logits_loss(student: Any, teacher: Any, ids: Any, into: Any) -> Any:
    """Forward KL as one would write it with torch alone."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits
    logits = student(input_ids=ids, use_cache=False).logits
    return F.kl_div(
        F.log_softmax(logits.flatten(0, 1), -1), F.log_softmax(wanted.flatten(0, 1), -1), log_target=True, reduction="batchmean"
    )


def op_loss(student: Any, teacher: Any, ids: Any, into: Any) -> Any:
    """Forward KL by the fused loss."""
    import torch

    from undo_core import ops
    from undo_core.models import head_of, hidden_states

    with torch.no_grad():
        wanted = hidden_states(teacher, ids)
    head, other = head_of(student), head_of(teacher)
    options = head.options("student_") | other.options("teacher_")
    return ops.linear_kl_div(hidden_states(student, ids), head.weight, wanted, other.weight, accumulate_into=into, **options)


# -- the parent ----------------------------------------------------------------------------------------------------------------


def prepare(shape: Shape, folder: Path, steps: int) -> None:
    """Writes the teacher, the damaged student, the sequences and the teacher's cache to disk."""
    import torch
    from transformers import AutoConfig

    from undo_core.data.sequences import Sequences
    from undo_core.distillation.cache import cache_teacher
    from undo_core.models import initialise, load_model
    from undo_core.noise.checkpoint import noise_checkpoint

    config = AutoConfig.for_model(
        "gemma2", num_hidden_layers=shape.layers, hidden_size=shape.width, intermediate_size=shape.inner,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, head_dim=shape.head_dim,
        query_pre_attn_scalar=256, vocab_size=shape.vocabulary,
    )  # fmt: skip
    initialise(config, 0).save_pretrained(folder / "teacher")
    (folder / "student").mkdir()
    noise_checkpoint(folder / "teacher", folder / "student", alpha=0.6, beta=0.1, seed=0, progress=False)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, shape.vocabulary, (shape.rows * steps, shape.length), generator=generator)
    sequences = Sequences(ids.to(torch.int32), pad_id=0)
    sequences.save(folder / "sequences.safetensors")
    cache_teacher(load_model(folder / "teacher"), sequences, folder / "cache", progress=False)


def predicted(name: str, shape: Shape, folder: Path) -> int | None:
    """Returns the peak that ``undo plan`` predicts, models included, process excluded; None for a loop that is not undo-core's."""
    from transformers import AutoConfig

    from undo_core.distillation.teacher import TeacherConfig
    from undo_core.pipeline.memory.predictor import Predictor
    from undo_core.pipeline.stage import Folder
    from undo_core.pipeline.stages import Distill
    from undo_core.training import TrainConfig

    mode = MODES[name]
    if mode.loop is not None:
        return None
    model = Folder(folder / "teacher")
    stage = Distill(
        train=TrainConfig(batch_size=shape.rows, micro_batch_size=1, **mode.train),
        recover=None,
        config=TeacherConfig(mode.teacher),
        **dict.fromkeys(("prepared", "teacher", "student"), model),
    )
    predict = Predictor(AutoConfig.from_pretrained(folder / "teacher"), shape.length, evaluated=1, device="cpu")
    phases = [memory for memory in predict.phases(stage) if memory.phase in ("forward", "backward", "step")]
    return max(memory.total - memory.process for memory in phases)  # the workers do not evaluate


class Worker:
    """The process of a contender."""

    def __init__(self, name: str, shape: Shape, steps: int, folder: Path) -> None:
        request = json.dumps({"name": name, "shape": asdict(shape), "steps": steps, "folder": str(folder)})
        command = [sys.executable, "-W", "ignore", __file__, "--worker", request]
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | harness.MALLOC,
        )
        self.hear("ready")

    def hear(self, wanted: str) -> dict[str, Any]:
        for line in self.process.stdout:
            if line.startswith("{") and wanted in (message := json.loads(line)):
                return message
        code = self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"worker: exit status {code}: {(self.errors.read().strip().splitlines() or ['nothing said'])[-1]}")

    def step(self, last: bool) -> tuple[float, dict[str, Any]]:
        """Takes a step; returns its seconds and the worker's message, which after the last step is its report."""
        began = time.perf_counter()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        message = self.hear("loss" if last else "ready")
        return time.perf_counter() - began, message


def measure(names: list[str], shape: Shape, steps: int, folder: Path, note: Callable[[str], None]) -> list[dict[str, Any]]:
    """Returns the records of the contenders, measured two at a time beside the plain loop; each first step is a warm-up."""
    records: list[dict[str, Any]] = []
    others = [name for name in names if name != "plain"]
    for first in range(0, max(len(others), 1), 2):
        workers = {name: Worker(name, shape, steps, folder) for name in ("plain", *others[first : first + 2])}
        samples: dict[str, list[float]] = {name: [] for name in workers}
        for index in range(steps):
            for name, process in workers.items():
                seconds, end = process.step(index == steps - 1)
                samples[name].append(seconds)
                if index == steps - 1 and not (name == "plain" and records):
                    facts = {
                        "loss": end["loss"],
                        "resident_before": end["resident"],
                        "peak": end["peak"],
                        "ran": {"both": end["ran"]},
                    }
                    facts |= {"process": end["process"], "predicted": predicted(name, shape, folder)}
                    beside = None if name == "plain" else samples["plain"][1:]
                    records.append(
                        {"name": name, "label": MODES[name].label, "samples_s": samples[name][1:], "beside": beside, **facts}
                    )
            note(f"{', '.join(workers)}: step {index + 1} of {steps}")
        for process in workers.values():
            process.process.wait()
    return records


def table(records: list[dict[str, Any]], tokens: int) -> Table:
    """Returns the results as a table for the terminal."""
    result = Table(
        "mode",
        "step",
        "faster",
        "tokens/s",
        "peak\nbeyond models",
        "of plain's",
        "peak\nin all",
        "predicted /\nmeasured",
        "mean loss",
    )
    whole = records[0]["peak"] - records[0]["resident_before"]
    for record in records:
        seconds, extra = statistics.median(record["samples_s"]), record["peak"] - record["resident_before"]
        result.add_row(
            record["label"], harness.seconds(seconds), harness.times(faster(record)), f"{tokens / seconds:.0f}",
            harness.megabytes(extra), f"{extra / whole:.2f}", harness.megabytes(record["peak"]), accuracy(record), f"{record['loss']:.5f}",
        )  # fmt: skip
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of each contender; the first is a warm-up (6)")
    parser.add_argument(
        "--modes", nargs="*", choices=list(MODES), default=list(MODES), help="contenders to measure; plain is always measured"
    )
    parser.add_argument("--rows", type=int, default=1, help="sequences of a batch, each of which is a micro-batch (1)")
    parser.add_argument(
        "--quick", action="store_true", help="use a tiny model, to see that everything runs; nothing is recorded"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results (default: bench/results/step-cpu/MACHINE-VERSION.json; none with --quick)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        request = json.loads(options.worker)
        worker(request["name"], Shape(**request["shape"]), request["steps"], Path(request["folder"]))
        return 0
    harness.commit()  # asked for first: the commit of the code that runs, even if files change meanwhile
    if options.steps < 2:
        parser.error(f"--steps: got {options.steps}, wanted at least 2: the first is a warm-up")
    small = {
        "layers": 2,
        "width": 32,
        "inner": 64,
        "heads": 2,
        "key_value_heads": 1,
        "head_dim": 16,
        "vocabulary": 8209,  # the smallest size at which the kernels run
        "length": 65,
    }
    shape = Shape(rows=options.rows, **(small if options.quick else {}))
    with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
        folder = Path(name)
        console.print("models, sequences and the teacher's cache ...")
        prepare(shape, folder, options.steps)
        modes = ["plain", *(mode for mode in options.modes if mode != "plain")]
        records = measure(modes, shape, options.steps, folder, console.print)
    console.print(table(records, shape.rows * (shape.length - 1)))
    row = {"id": "step", "shape": asdict(shape), "contenders": records}
    row["provenance"] = harness.provenance("bench/bench_step.py", sys.argv[1:] if arguments is None else arguments)
    if options.out or not options.quick:
        console.print(f"results: {harness.record('step', [row], 'cpu', options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
