"""Compares training on one, two and four ranks: gradients of every stage and loss, and loss curves; draws the curves.

The ranks are processes on this machine that communicate by gloo. Models, stages and data are those of the tests
(`tests/support/rank_cases.py`); the curve of the demo trains the demo's own model on the demo's data. Results:
`bench/results/several-ranks/ranks.json`, `docs/results/several-ranks/curves.png` and `gradients.md`.

    python bench/several_ranks.py              # about ten minutes on two cores
    python bench/several_ranks.py --draw-only  # from the recorded results
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from rank_cases import CONFIG, MODELS, STAGES, first_gradients, largest_error, pretraining, sequences  # noqa: E402
from ranks import on_ranks  # noqa: E402

from undo_core import distributed  # noqa: E402
from undo_core.data.arithmetic import compact_splits  # noqa: E402
from undo_core.models import build_model  # noqa: E402
from undo_core.pipeline.config_files import read_settings  # noqa: E402
from undo_core.report.style import DPI, STYLE  # noqa: E402
from undo_core.training import TrainConfig, sequence_source  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "several-ranks" / "ranks.json"
PICTURES = ROOT / "docs" / "results" / "several-ranks"
RANKS = (1, 2, 4)
STEPS = 40
CURVE = TrainConfig(steps=STEPS, batch_size=32, lr=3e-3, warmup=5, clip=1.0, eval_every=1, seed=0)
TITLES = {"demo": "the demo's model (Gemma 2, tied)", "untied": "a Llama, untied", "tied": "a GPT-2, tied, with dropout"}
STYLES = {1: ("#0072B2", "-", 5.0), 2: ("#E69F00", "-", 2.5), 4: ("#000000", ":", 1.4)}


def trained(name: str) -> tuple[nn.Module, Any]:
    """The model of a curve, and its data."""
    if name != "demo":
        return MODELS[name](), sequences(400)
    tokenizer, splits = compact_splits(seed=0, train_rows=4000, eval_prompts=10)
    settings = read_settings(str(ROOT / "configs" / "arithmetic-cpu.yaml"))["model"]["config"]
    return build_model(settings, tokenizer, seed=0), splits["train_retain"]


def curve(name: str) -> list[float]:
    """Training loss of each step."""
    model, data = trained(name)
    result = pretraining(model, CURVE, source=sequence_source(data, CURVE.batch_size, 0))
    return [entry["loss"] for entry in result.history if "loss" in entry]


def gradients(cases: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Gradients of the first step of each case."""
    return {case: first_gradients(MODELS[case[1]](), STAGES[case[0]]) for case in cases}


def shared_gradients(cases: list[tuple[str, str]]) -> Any:
    """Gradients on ranks of which pairs share the heads; those of rank 0, which are whole."""
    distributed.arrange(distributed.ParallelConfig(tensor=2))
    found = gradients(cases)
    return found if distributed.rank() == 0 else None


def shared_errors(cases: list[tuple[str, str]], wanted: dict[tuple[str, str], dict[str, torch.Tensor]]) -> dict[str, Any]:
    """The largest errors of the gradients where pairs of ranks share the heads, by number of ranks."""
    found = {count: on_ranks(count, shared_gradients, cases)[0] for count in RANKS if count > 1}
    return {str(count): errors(cases, own, wanted) for count, own in found.items()}


def errors(cases: list[tuple[str, str]], found: Any, wanted: Any) -> dict[str, float]:
    """The largest error of the gradients of each case."""
    return {" / ".join(case): largest_error(found[case], wanted[case]) for case in cases}


def measured(cases: list[tuple[str, str]]) -> Any:
    """Gradients and curves; on several ranks those of rank 0, which are whole."""
    found = gradients(cases), {name: curve(name) for name in MODELS}
    return found if distributed.rank() == 0 else None


def record() -> dict[str, Any]:
    """Trains on each number of ranks and returns the curves and the largest errors of the gradients."""
    cases = [(stage, model) for stage in STAGES for model in MODELS]
    found = {count: measured(cases) if count == 1 else on_ranks(count, measured, cases)[0] for count in RANKS}
    wanted = found[1][0]
    return {
        "config": dataclasses.asdict(CONFIG),
        "curve": dataclasses.asdict(CURVE),
        "torch": torch.__version__,
        "curves": {str(count): curves for count, (_, curves) in found.items()},
        "gradient_errors": {str(count): errors(cases, own, wanted) for count, (own, _) in found.items() if count > 1},
        "shared_errors": shared_errors(cases, wanted),
    }


def draw(results: dict[str, Any]) -> Any:
    """Draws the loss curves of each model, and below them how far those of several ranks are from that of one."""
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(10.5, 4.6), layout="constrained")
        axes = figure.subplots(2, len(TITLES), sharex=True, height_ratios=(2, 1))
        for column, (name, title) in enumerate(TITLES.items()):
            top, bottom = axes[:, column]
            one = results["curves"]["1"][name]
            for count in RANKS:
                colour, line, width = STYLES[count]
                own = results["curves"][str(count)][name]
                steps = range(1, len(own) + 1)
                label = f"{count} rank{'s' if count > 1 else ''}"
                top.plot(steps, own, line, color=colour, linewidth=width, label=label)
                if count > 1:
                    off = [abs(a - b) / abs(b) for a, b in zip(own, one, strict=True)]
                    bottom.plot(steps, [max(x, 1e-9) for x in off], line, color=colour, linewidth=width, label=label)
            top.set_title(title, fontsize=10)
            bottom.set_yscale("log")
            bottom.set_ylim(1e-9, 1e-3)
            bottom.axhline(2.0**-24, color="#9a9a9a", linewidth=0.8)
            bottom.set_xlabel("step")
        axes[0, 0].set_ylabel("training loss, nats")
        axes[1, 0].set_ylabel("relative difference\nfrom one rank")
        axes[1, 0].annotate("rounding of float32", (len(one), 2.0**-24), fontsize=7, color="#5b5b5b", ha="right", va="bottom")
        axes[0, 0].legend(frameon=False)
    return figure


def table(results: dict[str, Any]) -> str:
    """The gradients' errors as Markdown tables."""
    lines = [
        "# Gradients on two and four ranks",
        "",
        "Largest difference of a parameter's gradient from that of one process, relative to its norm, in the first step of each stage and",
        f"loss: batches of {results['config']['batch_size']} sequences, float32, gloo. Written by `python bench/several_ranks.py`.",
        "",
        *_rows(results["gradient_errors"]),
        "",
        "The same where pairs of ranks share the head (`parallel.tensor: 2`): one pair, and two pairs.",
        "",
        *_rows(results["shared_errors"]),
    ]
    return "\n".join(lines) + "\n"


def _rows(errors: dict[str, dict[str, float]]) -> list[str]:
    head = [f"{model}, {count} ranks" for model in MODELS for count in errors]
    lines = [
        f"| stage | {' | '.join(head)} |",
        f"|---|{'---|' * len(head)}",
    ]
    for stage in STAGES:
        values = [f"{errors[count][f'{stage} / {model}']:.1e}" for model in MODELS for count in errors]
        lines.append(f"| {stage} | {' | '.join(values)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw-only", action="store_true", help="draw the recorded results again")
    if not parser.parse_args().draw_only:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(record(), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(PICTURES / "curves.png", dpi=DPI, facecolor="white", metadata={"Software": None})
    (PICTURES / "gradients.md").write_text(table(results))


if __name__ == "__main__":
    main()
