"""Says where the seconds of a training step go, by part, beside a plain loop of transformers and torch.

    python bench/profile_step.py CHECKPOINT
    python bench/profile_step.py CHECKPOINT --batch 4 --length 64 --threads 1
    python bench/profile_step.py CHECKPOINT --compile

CHECKPOINT is a folder of a model; without one, random weights in the shape of Gemma 3 270M are used, which take the same time. Both
loops compute the same parts, one after another, in the same process: the embedding and the trunk (transformers' own), the head with
the loss and their gradients, the gradient of a tied embedding, clipping and the optimizer step. Below stands what a stage pays once
or now and then. Each number is the median of processor seconds, all threads together; on a quiet machine it is the elapsed time
times the number of threads. The plain loop takes torch's fused AdamW. With ``--json`` the table is also written as JSON.
``--compile`` measures one thing alone: the trunk as it is beside ``torch.compile`` of it, in elapsed seconds, and what its warm-up costs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from summaries import markdown
from transformers import AutoConfig, PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.distributed import head_ops
from undo_core.evaluation.metrics import evaluate
from undo_core.io.files import hash_file
from undo_core.models import Head, head_of, initialise, load_model
from undo_core.training import TrainConfig
from undo_core.training.embedding import tied_gradient_in_place
from undo_core.training.identity import weights_digest
from undo_core.training.loop import CHECKPOINT_SHARE
from undo_core.training.optimizers import Updater
from undo_core.training.training_state import CheckpointWriter

SHAPE = {
    "vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 2048,
}  # fmt: skip
PARTS = (
    "trunk, forward",
    "head and loss, with gradients",
    "trunk, backward",
    "embedding gradient",
    "clipping",
    "optimizer step",
)
LOSSES = {"cross-entropy": "relearning", "maxent": "unlearning, forget text", "kl": "distillation, cached teacher"}
OLD_INTERVAL = 10.0  # seconds between checkpoints, whatever they cost, before their share of the time was limited

Times = dict[str, list[float]]


@contextmanager
def timed(times: Times, part: str) -> Iterator[None]:
    """Adds the processor seconds of the block to ``times``."""
    began = time.process_time()
    yield
    times.setdefault(part, []).append(time.process_time() - began)


def fused_loss(kind: str, hidden: torch.Tensor, head: Head, labels: torch.Tensor, known: tuple[torch.Tensor, Head]) -> Any:
    """The loss as undo-core's stages compute it."""
    mask = torch.ones_like(labels, dtype=torch.bool)
    if kind == "cross-entropy":
        return head_ops.linear_cross_entropy(hidden, head, labels)
    if kind == "maxent":
        return head_ops.linear_uniform_kl(hidden, head, mask=mask)
    return head_ops.linear_kl_div(hidden, head, *known, mask=mask)


def plain_loss(kind: str, hidden: torch.Tensor, head: Head, labels: torch.Tensor, known: tuple[torch.Tensor, Head]) -> Any:
    """The loss from logits, as one would write it with torch alone."""
    logits = F.linear(hidden.flatten(0, 1), head.weight)
    if kind == "cross-entropy":
        return F.cross_entropy(logits, labels.flatten())
    logprobs = F.log_softmax(logits, -1)
    if kind == "maxent":
        return -logprobs.mean()
    with torch.no_grad():
        wanted = F.log_softmax(F.linear(known[0].flatten(0, 1), known[1].weight), -1)
    return F.kl_div(logprobs, wanted, log_target=True, reduction="batchmean")


def step(model: PreTrainedModel, ids: torch.Tensor, loss: Callable[[torch.Tensor], Any], times: Times) -> None:
    """Takes the forward and backward passes of a step, part by part."""
    embedded = model.get_input_embeddings()(ids)
    inputs = embedded.detach().requires_grad_()
    with timed(times, "trunk, forward"):
        hidden = model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    leaf = hidden.detach().requires_grad_()
    with timed(times, "head and loss, with gradients"):
        loss(leaf).backward()
    with timed(times, "trunk, backward"):
        hidden.backward(leaf.grad)
    with timed(times, "embedding gradient"):
        embedded.backward(inputs.grad)


def ours(model: PreTrainedModel, kind: str, ids: torch.Tensor, known: Any, steps: int) -> Times:
    """Times the parts of undo-core's step."""
    times: Times = {}
    updater = Updater(model, list(model.parameters()), TrainConfig(lr=1e-6))
    update = updater._update
    for index in range(steps):
        spent: Times = {}

        def measured(*arguments: Any, spent: Times = spent) -> None:
            with timed(spent, "optimizer step"):
                update(*arguments)

        updater._update = measured
        with tied_gradient_in_place(model) as tied, updater.attached(tied):
            updater.begin(index, 1e-6)
            step(model, ids[:, :-1], lambda h: fused_loss(kind, h, head_of(model), ids[:, 1:], known), times)
            with timed(spent, "clipping"):
                updater.step()
        times.setdefault("optimizer step", []).append(spent["optimizer step"][0])
        times.setdefault("clipping", []).append(spent["clipping"][0] - spent["optimizer step"][0])
    return times


def plain(model: PreTrainedModel, kind: str, ids: torch.Tensor, known: Any, steps: int) -> Times:
    """Times the same parts of a plain loop."""
    times: Times = {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    for _ in range(steps):
        step(model, ids[:, :-1], lambda h: plain_loss(kind, h, head_of(model), ids[:, 1:], known), times)
        with timed(times, "clipping"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with timed(times, "optimizer step"):
            optimizer.step()
        optimizer.zero_grad()
    return times


def stage_costs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """Processor seconds of what a stage does once or now and then."""
    times: Times = {}
    updater = Updater(model, list(model.parameters()), TrainConfig(lr=1e-6))
    for parameter in updater.targets:
        parameter.grad = torch.zeros_like(parameter)
    updater.step()  # creates the moments
    sequences = Sequences(ids, pad_id=-1)
    with tempfile.TemporaryDirectory() as folder:
        with (
            CheckpointWriter(Path(folder) / "checkpoint", model, updater) as writer,
            timed(times, "checkpoint, weights and moments"),
        ):
            writer.write(1, {})
        with timed(times, "saving the model"):
            model.save_pretrained(folder)
        with timed(times, "hash of the saved file"):
            hash_file(Path(folder) / "model.safetensors")
        with timed(times, "loading the model"):
            load_model(folder, torch.float32)
    with timed(times, "digest of the weights, at the start of a stage"):
        weights_digest(model)
    with timed(times, "evaluation of the batch's tokens"):
        evaluate(model, sequences)
    with torch.no_grad(), timed(times, "evaluation of the batch's tokens, transformers"):
        model(input_ids=ids, labels=ids, use_cache=False)
    return {name: values[0] for name, values in times.items()}


def compiled_trunk(model: PreTrainedModel, ids: torch.Tensor, steps: int, backend: str = "inductor") -> dict[str, float]:
    """Times the trunk as it is and compiled, forward and backward, in turns; elapsed seconds, because compilers run in other processes."""
    trunks = {"as it is": model.base_model, "compiled": torch.compile(model.base_model, dynamic=False, backend=backend)}
    times: Times = {}
    for _ in range(steps + 1):
        for name, trunk in trunks.items():
            began = time.perf_counter()
            trunk(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
            times.setdefault(name, []).append(time.perf_counter() - began)
            model.zero_grad()
    found = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**found, "warm-up": times["compiled"][0] - found["compiled"]}


def compiled_table(found: dict[str, float]) -> str:
    """Returns the times of :func:`compiled_trunk` as Markdown."""
    saved = found["as it is"] - found["compiled"]
    repaid = f"{found['warm-up'] / saved:,.0f}" if saved > 0 else "never"
    cells = [f"{found[name]:.2f}" for name in ("as it is", "compiled", "warm-up")]
    return markdown(["trunk, forward and backward: seconds", "compiled", "warm-up", "steps that repay it"], [[*cells, repaid]])


def table(results: dict[str, Any]) -> str:
    """Returns both tables as Markdown."""
    lines = []
    for part in (*PARTS, "whole step"):
        cells = []
        for kind in LOSSES:
            for loop in ("undo-core", "plain"):
                found = results["steps"][kind][loop]
                cells.append(f"{found[part] if part in found else sum(found.values()):.2f}")
        lines.append([part, *cells])
    header = ["processor seconds", *(f"{said}{loop}" for said in LOSSES.values() for loop in ("", ": plain"))]
    write = results["stage"]["checkpoint, weights and moments"]
    once = [[name, f"{value:.2f}"] for name, value in results["stage"].items()]
    once.append(["share of the time for checkpoints: one every 10 s", f"{write / (OLD_INTERVAL + write):.0%}"])
    interval = max(OLD_INTERVAL, write / CHECKPOINT_SHARE)
    once.append(["share of the time for checkpoints: now", f"{write / (interval + write):.0%}"])
    said = f"{results['batch']} sequences of {results['length']} tokens, {results['threads']} thread(s), float32."
    return f"{said}\n\n{markdown(header, lines)}\n\n{markdown(['once or now and then', 'processor seconds'], once)}"


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="measured steps, after one that warms up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, help="layers of the random model")
    parser.add_argument("--vocabulary", type=int, help="vocabulary entries of the random model")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile of the trunk, and nothing else")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.checkpoint is not None:
        model = load_model(arguments.checkpoint, torch.float32)
    else:
        other = {"num_hidden_layers": arguments.layers, "vocab_size": arguments.vocabulary}
        shape = {**SHAPE, **{name: value for name, value in other.items() if value}}
        model = initialise(AutoConfig.for_model("gemma3_text", **shape), seed=0)
    vocabulary, width = model.get_output_embeddings().weight.shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, vocabulary, (arguments.batch, arguments.length + 1), generator=generator)
    if arguments.compile:
        found = compiled_trunk(model, ids, arguments.steps)
        print(compiled_table(found))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    teacher = dataclasses.replace(head_of(model), weight=model.get_output_embeddings().weight.detach().clone())
    known = (torch.randn(arguments.batch, arguments.length, width, generator=generator), teacher)
    results: dict[str, Any] = {"steps": {}, **{name: getattr(arguments, name) for name in ("batch", "length", "threads")}}
    for kind in LOSSES:
        for loop, run in (("undo-core", ours), ("plain", plain)):
            times = run(model, kind, ids, known, arguments.steps + 1)
            found = {part: statistics.median(values[1:]) for part, values in times.items()}
            results["steps"].setdefault(kind, {})[loop] = {part: found[part] for part in PARTS}
    results["stage"] = stage_costs(model, ids)
    print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
