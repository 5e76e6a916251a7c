"""Comparison of the results with the two claims in the abstract of arXiv 2506.06278."""

from __future__ import annotations

import statistics
from typing import Any

from undo_core.report.metrics import Report
from undo_core.report.table import count, ratio

PUBLISHED = (
    "Published: labels for 0.01 % of the pretraining data, and the robustness of data filtering, R = 1, at 60–80 % of its "
    "compute. Here:"
)


def claims(report: Report) -> list[str]:
    """Sentences on labels and on compute to print below :data:`PUBLISHED`, if the results allow them; means over seeds."""
    return [sentence for sentence in (_labels(report), _compute(report)) if sentence]


def label_shares(report: Report) -> dict[int, tuple[int, int]]:
    """Labelled (forget and retain) tokens of unlearning, and tokens of pretraining, by seed where both are known."""
    pretrained = {seed: run.get("tokens") for model in report.of("original") for seed, run in model.trainings.items()}
    shares = {}
    for model in report.of("unlearn"):
        for seed, entry in model.entries.items():
            tokens = (entry.get("costs") or {}).get("pretraining_tokens") or pretrained.get(seed)
            labelled = labelled_tokens(entry)
            if labelled and tokens:
                shares[seed] = sum(labelled.values()), tokens
    return shares


def labelled_tokens(entry: dict[str, Any]) -> dict[str, int]:
    """Number of labelled forget and retain tokens that the unlearning of a model used.

    Older results count a token every time it was read.
    """
    named = (entry.get("costs") or {}).get("labelled_tokens")
    if named:
        return dict(named)
    training = entry.get("training") or {}
    counts = {name: training.get(f"labelled_{name}_tokens") for name in ("forget", "retain")}
    return {name: tokens for name, tokens in counts.items() if tokens}


def _labels(report: Report) -> str:
    shares = list(label_shares(report).values())
    if not shares:
        return ""
    labelled, tokens = (statistics.fmean(pair[index] for pair in shares) for index in (0, 1))
    share = statistics.fmean(pair[0] / pair[1] for pair in shares)
    return (
        f"Labels: {count(labelled)} labelled tokens, forget and retain, {_percent(share)} of the {count(tokens)} tokens of "
        "pretraining."
    )


def _compute(report: Report) -> str:
    model = report.strongest
    if model is None or not (model.robustness and model.compute["steps"]):
        return ""
    shares = [f"{_percent(model.compute['flops'].mean)} of data filtering's FLOPs"] if model.compute["flops"] else []
    owner = "its" if shares else "data filtering's"
    shares.append(f"{_percent(model.compute['steps'].mean)} of {owner} training steps")
    return f"Compute: α = {model.alpha:g} reaches R = {ratio(model.robustness.mean)} at {' and '.join(shares)}."


def _percent(share: float) -> str:
    """Formats a share in per cent: two significant digits below 10 %, whole numbers from there on."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
