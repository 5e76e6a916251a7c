"""What each attack took: the length of a trial, the text that it reads, and its floating-point operations."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from undo_core.report.metrics import Report
from undo_core.report.table import Cell, Table, count

ABOUT = (
    "Tokens of a trial: steps × sequences of a step × tokens of a sequence. A trial is one learning rate, data order or setting of "
    "the grid. FLOPs are those of the longest trial, and of all trials on a model; means over models and seeds. Attacks that train "
    "nothing have no row."
)


def attack_cost_table(report: Report) -> Table:
    """Table of what each attack that trains took, one row per attack; no rows if none trains.

    The length of a sequence is that of packed text; it is not given for data with a problem in each sequence.
    """
    headers = [
        ("attack", ""),
        ("trials", "a model"),
        ("steps", "a trial"),
        ("sequences", "a step"),
        ("tokens", "a sequence"),
        ("tokens", "a trial"),
        ("FLOPs", "a trial"),
        ("FLOPs", "all trials"),
    ]
    config: dict[str, Any] = report.results[0].get("config") or {}
    length = _length(config)
    found: dict[str | None, list[dict[str, Any]]] = {}
    for name, attack in _attacks(report):
        found.setdefault(name, []).append(attack)
    rows = []
    for name, attacks in found.items():
        settings = config.get("relearn") if name is None else (config.get("attacks") or {}).get(name)
        sequences = (settings or {}).get("batch_size")
        searched = any(attack.get("trials") for attack in attacks)  # each trial has settings of its own
        steps = max(_steps(attack) for attack in attacks)
        read = None if searched or not (sequences and length) else steps * sequences * length
        each, spent = zip(*(_flops(attack) for attack in attacks), strict=True)
        rows.append(
            [
                Cell(name or "fine-tuning"),
                Cell(_range([len(attack.get("trials") or attack["curves"]) for attack in attacks])),
                Cell(f"up to {steps}" if searched else str(steps)),
                Cell("searched") if searched else Cell(str(sequences)) if sequences else Cell(),
                Cell(str(length)) if length else Cell(),
                Cell(count(read)) if read else Cell(),
                _mean([value for value in each if value is not None]),
                _mean([value for value in spent if value is not None]),
            ]
        )
    return Table(headers, rows)


def _attacks(report: Report) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Attacks that train, each on one model and seed, with their names; None for the headline attack."""
    for model in report.models:
        for seed, attack in model.attacks.items():
            for name, one in {None: attack, **(model.entries[seed].get("attacks") or {})}.items():
                if _steps(one) and one["curves"]:
                    yield name, one


def _length(config: dict[str, Any]) -> int | None:
    data: dict[str, Any] = config.get("data") or {}
    return None if data.get("kind", "arithmetic-compact") == "arithmetic-compact" else data.get("length")


def _steps(attack: dict[str, Any]) -> int:
    return max((trial["steps"][-1] for trial in attack.get("trials") or [attack]), default=0)


def _flops(attack: dict[str, Any]) -> tuple[float | None, float | None]:
    """FLOPs of the longest trial, and of all trials; None where they are not recorded."""
    trials = [trial["flops"][-1] for trial in attack.get("trials") or attack["curves"] if trial.get("flops")]
    return max(trials, default=None), attack.get("spent_flops", sum(trials) if trials else None)


def _mean(values: list[float]) -> Cell:
    return Cell(f"{statistics.fmean(values):.2e}") if values else Cell()


def _range(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
