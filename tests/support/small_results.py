"""Small results of runs, made by hand, for tests of the report."""

from __future__ import annotations

import io
import math
from typing import Any

from rich.console import Console

from undo_core.report import derive, terminal_table
from undo_core.report.metrics import Report
from undo_core.report.words import opening

STEPS = [0, 20, 100]
RATES = [1e-3, 4e-3]
FIGURES = ["relearning", "compute", "tradeoff", "training", "rates"]


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 500}


def attack(*curves: list[float]) -> dict[str, Any]:
    """Returns an attack with one forget curve per rate, and retain performance 0.9, 0.8, 0.7 in the order of the rates."""
    return {
        "rates": RATES,
        "steps": STEPS,
        "extended": False,
        "worst_at_end_of_grid": False,
        "curves": [
            {
                "rate": rate,
                "stage": "relearn-0",
                "forget": [score(v) for v in curve],
                "retain": [score(0.9 - 0.1 * i)] * len(STEPS),
            }
            for i, (rate, curve) in enumerate(zip(RATES, curves, strict=True))
        ],
    }


def search(*trials: tuple[int, float]) -> dict[str, Any]:
    """Returns a search whose trials took so many steps and FLOPs."""
    point = {"rate": 1e-3, "batch_size": 4, "optimizer": "sgd", "warmup": 0.1, "retain_share": 0.5, "rank": 0, "scaling": None}
    scores = {"forget": [score(0.1), score(0.3)], "retain": [score(0.9), score(0.7)]}
    found = [
        {"setting": f"trial-{number}", "point": point, "steps": [0, steps], "flops": [0.0, flops], "best": 1, **scores}
        for number, (steps, flops) in enumerate(trials)
    ]
    curve = {"rate": None, "forget": [score(0.3)], "retain": [score(0.7)], "stage": "s", "setting": "best"}
    last = {"steps": [trials[-1][0]], "headline_step": trials[-1][0], "curves": [curve]}
    return {"kind": "search", "trials": found, "best": 0, "spent_flops": math.fsum(flops for _, flops in trials), **last}


def measure(number: float | None) -> dict[str, Any]:
    """Returns a measure of one point with its number."""
    shown = {"kind": "cka", "axis": "layer", "value": "linear CKA", "summary": "mean", "text": "forget"}
    return {**shown, "number": number, "points": [{"at": 1, "value": number}]}


def trained(steps: int, flops: float, reached: bool = True) -> dict[str, Any]:
    stops = {"stop_step": steps, "stop_tokens": 10 * steps, "stop_flops": flops} if reached else {}
    return {
        "steps": steps,
        "tokens": 10 * steps,
        "flops": flops,
        "seconds": 3.0,
        "limit_reached": not reached,
        "unlearning_steps": 0,
        "stop_step": None,
        "stop_tokens": None,
        "stop_flops": None,
        **stops,
        "labelled_forget_tokens": 7,
        "labelled_retain_tokens": 9,
        "peak_bytes": 1 << 20,
        "history": [{"step": s, "retain": 0.9 * s / steps, "loss": 1.0} for s in range(0, steps + 1, 20)],
    }


def model(kind: str, training: dict[str, Any], attacked: dict[str, Any] | None, alpha: float | None = None) -> dict[str, Any]:
    forget = 0.98 if kind == "original" else 0.05
    metrics = {name: score(value) for name, value in {"retain": 0.95, "forget": forget, "heldout_forget": 0.06}.items()}
    metrics["retain"]["groups"] = {"+": score(0.96), "-": score(0.94)}
    name = f"undo-{alpha:g}" if alpha is not None else kind
    return {
        "name": name,
        "kind": kind,
        "alpha": alpha,
        "stage": "s",
        "metrics": metrics,
        "training": training,
        "attack": attacked,
    }


def run(seed: int = 0, kind: str = "accuracy") -> dict[str, Any]:
    """Worst cases at step 100: unlearn 0.9, UNDO 0.7 and 0.5, random 0.4, filter 0.3; S: 100, 300, 450 and 500 steps.

    With a loss, each value v is replaced by 1 - v: the same differences, the other sign.
    """

    def curves(*values: list[float]) -> dict[str, Any]:
        return attack(*[[v if kind == "accuracy" else 1 - v for v in curve] for curve in values])

    return {
        "format": 1,
        "name": "small",
        "seed": seed,
        "command": f"undo run small.yaml --seed {seed}",
        "versions": {"torch": "2"},
        "machine": {"device": "a processor"},
        "config": {"name": "small", "output": f"out-{seed}", "seed": seed, "unlearn": {"method": "maxent"}},
        "metric": {"kind": kind, "headline_step": 100, "retain_target": 0.9, "eval_splits": {"test_retain": 500}},
        "models": [
            model("original", trained(400, 4e9), None),
            model("unlearn", trained(40, 1e8, False), curves([0.05, 0.6, 0.8], [0.05, 0.5, 0.9])),
            model("undo", trained(100, 5e8), curves([0.05, 0.2, 0.7], [0.05, 0.3, 0.6]), 0.2),
            model("undo", trained(300, 15e8), curves([0.05, 0.2, 0.4], [0.05, 0.1, 0.5]), 0.6),
            model("random", trained(450, 2e9), curves([0.05, 0.2, 0.4], [0.05, 0.1, 0.3])),
            model("filter", trained(500, 1e9), curves([0.05, 0.2, 0.3], [0.05, 0.1, 0.2])),
        ],
    }


def by_name(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {m.name: m for m in derive(results, "title").models}


def entry(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(m for m in result["models"] if m["name"] == name)


def censor(result: dict[str, Any], name: str) -> None:
    entry(result, name)["training"] |= {"stop_step": None, "stop_tokens": None, "stop_flops": None, "limit_reached": True}


def with_one_rate(result: dict[str, Any]) -> dict[str, Any]:
    """The results of an attack with the first learning rate alone, which is then at both ends of the grid."""
    for model in result["models"]:
        if model["attack"]:
            model["attack"] |= {"rates": RATES[:1], "curves": model["attack"]["curves"][:1], "worst_at_end_of_grid": True}
    return result


def said_first(report: Report) -> str:
    """The paragraphs above the results as one line, with ordinary spaces."""
    return " ".join(opening(report)).replace("\u00a0", " ")


def printed(*results: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(terminal_table(list(results)))
    return console.export_text()
