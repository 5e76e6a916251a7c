"""Attacks a minute on the demo's model: trials one by one beside trials that train as one batched run.

    python bench/bench_attacks.py
    python bench/bench_attacks.py --together 3 5 10 --trials 10 --steps 100 --rounds 3 --threads 1

The trials attack a model with random weights in the shape of ``configs/arithmetic-cpu.yaml``, with its batches of 64 sequences and, at the
evaluations of its attack, its two test sets of 1,000 sequences. A time is the median of processor seconds over interleaved rounds. Beside
them stand the operators that a step launches, and the processor seconds of a step's matrix products alone, in their shapes and numbers: no
other way of running the same attack on this processor can be faster than these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from launches import Launches
from summaries import markdown
from torch import nn
from transformers import PreTrainedModel

from undo_core.attacks import AttackConfig
from undo_core.attacks.relearning import mixed_cross_entropy, relearn
from undo_core.data.arithmetic import compact_splits
from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.models import build_model
from undo_core.training.batches import as_batch
from undo_core.training.together import Together

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "arithmetic-cpu.yaml"
TRAINING, EVALUATION, PRODUCTS = "training", "evaluation", "products"


class Clock:
    """Adds up processor seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - began


def attack(model: PreTrainedModel, splits: dict[str, Sequences], config: AttackConfig) -> dict[str, float]:
    """Runs the trials of ``config``; returns the processor seconds of their training and of their evaluation."""
    clock = Clock()

    def scored(attacked: PreTrainedModel) -> dict[str, float]:
        with clock(EVALUATION):
            return {name: evaluate(attacked, splits[f"test_{name}"])["value"] for name in ("forget", "retain")}

    with clock("both"):
        relearn(model, splits["train_forget"], config, evaluate=scored, progress=False)
    return {TRAINING: clock.seconds["both"] - clock.seconds[EVALUATION], EVALUATION: clock.seconds[EVALUATION]}


def launches(models: Sequence[PreTrainedModel], ids: torch.Tensor, together: bool) -> float:
    """Operators that compute the gradients of a step of all ``models``, for each of them."""
    batches = [{"forget": as_batch(ids)} for _ in models]
    counted = [{name: batch.counted for name, batch in own.items()} for own in batches]
    batched = Together(models) if together else None
    if batched:
        batched.gradients(batches, counted)  # stacks the weights
    with Launches() as mode:
        if batched:
            batched.gradients(batches, counted)
        else:
            for model, own, counts in zip(models, batches, counted, strict=True):
                mixed_cross_entropy(model, own, counts).backward()
    return mode.count / len(models)


def products(model: PreTrainedModel, tokens: int, steps: int) -> float:
    """Processor seconds of the matrix products in ``steps`` steps: of every linear layer forward, and for both gradients."""
    pairs = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            out, width = layer.weight.shape
            pairs.append((torch.randn(tokens, width), torch.randn(out, width), torch.randn(tokens, out)))
    clock = Clock()
    with clock(PRODUCTS), torch.no_grad():
        for _ in range(steps):
            for states, weight, gradient in pairs:
                torch.mm(states, weight.t())
                torch.mm(gradient, weight)
                torch.mm(gradient.t(), states)
    return clock.seconds[PRODUCTS]


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Medians by way: seconds of a trial's training and evaluation, and operators of one of its steps."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    settings = yaml.safe_load(CONFIG.read_text())
    tokenizer, splits = compact_splits(0, 5000, settings["data"]["eval_prompts"], settings["data"]["held_out"])
    model = build_model(settings["model"]["config"], tokenizer, 0)
    attacked = settings["relearn"]
    evaluate_at = sorted({round(step * arguments.steps / attacked["headline_step"]) for step in attacked["evaluate_at"]})
    rates = [1e-3 * (1 + index / 10) for index in range(arguments.trials)]
    ids = splits["train_forget"].input_ids[: attacked["batch_size"]].long()
    ways = {f"{count} at once": count for count in (1, *arguments.together)}
    seconds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    alone: list[float] = []
    for turn in range(arguments.rounds):
        names = list(ways)
        for way in names[turn % len(names) :] + names[: turn % len(names)]:
            config = AttackConfig(
                rates=rates, evaluate_at=evaluate_at, headline_step=arguments.steps, extend=0,
                batch_size=attacked["batch_size"], together=ways[way],
            )  # fmt: skip
            seconds[way].append({part: spent / arguments.trials for part, spent in attack(model, splits, config).items()})
        alone.append(products(model, ids[:, 1:].numel(), arguments.steps))
    found = {
        way: {part: statistics.median(one[part] for one in rounds) for part in (TRAINING, EVALUATION)}
        | {"launches": launches([build_model(settings["model"]["config"], tokenizer, 0) for _ in range(count)], ids, count > 1)}
        for (way, rounds), count in zip(seconds.items(), ways.values(), strict=True)
    }
    return found | {PRODUCTS: {TRAINING: statistics.median(alone)}}


def table(found: dict[str, dict[str, float]]) -> str:
    """The measurements as Markdown."""
    lines, base = [], found["1 at once"]
    for way, row in found.items():
        if way == PRODUCTS:
            continue
        spent = row[TRAINING] + row[EVALUATION]
        lines.append(
            [
                way.replace("1 at once", "one by one"),
                f"{row[TRAINING]:.2f}",
                f"{row[EVALUATION]:.2f}",
                f"{60 / spent:.1f}",
                f"{(base[TRAINING] + base[EVALUATION]) / spent:.2f}",
                f"{row['launches']:.0f}",
                f"{base['launches'] / row['launches']:.1f}",
            ]
        )
    lines.append(["matrix products of the training alone", f"{found[PRODUCTS][TRAINING]:.2f}", *["–"] * 5])
    header = ["trials", "training, s", "evaluation, s", "attacks a minute", "faster", "operators a step", "fewer"]
    return markdown(header, lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--together", type=int, nargs="+", default=[3, 10], help="trials in one batched run (3 10)")
    parser.add_argument("--trials", type=int, default=10, help="learning rates of the attack (10)")
    parser.add_argument("--steps", type=int, default=100, help="steps of a trial (100)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads, as a stage of the demo has (1)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    found = measure(arguments)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds; processor seconds of a trial\n")
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
