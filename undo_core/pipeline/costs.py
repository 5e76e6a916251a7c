"""Costs of the models in a run's results: labels relative to pretraining, and training relative to data filtering."""

from __future__ import annotations

from typing import Any

STOP = {"steps": "stop_step", "tokens": "stop_tokens", "flops": "stop_flops"}


def with_costs(models: list[dict[str, Any]], pretraining_tokens: int | None = None) -> list[dict[str, Any]]:
    """Returns the entries, with ``costs`` added to each trained model except the original and data filtering.

    - ``pretraining_tokens``: tokens that the original was pretrained on; None if unknown.
    - ``labelled_tokens``: labelled tokens of forget and of retain, each token of the data counted once.
    - ``labelled_share``: both together as a share of the pretraining tokens.
    - ``of_filter``: steps, tokens and FLOPs, unlearning included, as shares of those of data filtering. If both stop at the
      retain target, they are counted up to there; None if one of them never reached it.

    Args:
        models: entries with ``name``, ``kind`` and ``training``.
        pretraining_tokens: tokens of an original that was not pretrained in this run.
    """
    trainings = {entry["kind"]: entry["training"] for entry in models if entry["kind"] in ("original", "filter")}
    if trainings.get("original"):
        pretraining_tokens = trainings["original"]["tokens"]
    control = trainings.get("filter")
    result = []
    for entry in models:
        training = entry["training"]
        if training is not None and entry["kind"] not in ("original", "filter"):
            labelled = _labelled(training)
            share = sum(labelled.values()) / pretraining_tokens if labelled and pretraining_tokens else None
            of_filter = None if control is None else {unit: _ratio(training, control, unit) for unit in STOP}
            costs = {"pretraining_tokens": pretraining_tokens, "labelled_tokens": labelled, "labelled_share": share}
            entry = {**entry, "costs": {**costs, "of_filter": of_filter}}
        result.append(entry)
    return result


def _labelled(training: dict[str, Any]) -> dict[str, int] | None:
    if training.get("labelled_distinct_tokens"):
        return training["labelled_distinct_tokens"]
    counts = {name: training.get(f"labelled_{name}_tokens") for name in ("forget", "retain")}
    return counts if all(count is not None for count in counts.values()) else None


def _ratio(training: dict[str, Any], control: dict[str, Any], unit: str) -> float | None:
    """Ratio of a cost to that of data filtering: up to the retain target if both train to one, else of the whole training.

    Oracles have no target.
    """
    ruled = [run["limit_reached"] or run["stop_step"] is not None for run in (training, control)]
    name = STOP[unit] if all(ruled) else unit
    spent, base = training[name], control[name]
    if unit == "steps" and spent is not None:
        spent += training.get("unlearning_steps", 0)
    return spent / base if spent is not None and base else None
