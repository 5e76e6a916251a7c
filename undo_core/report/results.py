"""The outline of a run's results, and the settings in which the runs of several seeds must agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from undo_core.io.untrusted import checked_object

FORMAT = 1
KINDS = ("original", "defence", "unlearn", "undo", "damaged", "gated", "random", "filter", "oracle", "oracle-random")
SEARCH_SETTINGS = ("target_robustness", "alpha_resolution", "alpha_tries", "alpha_max")


def check_results(results: list[dict[str, Any]]) -> None:
    """Raises a ValueError unless ``results`` are those of runs that differ only in their seed."""
    if not results:
        raise ValueError("results: got none, wanted the results of one run or of several seeds")
    for result in results:
        check_result(result)
    seeds = [result["seed"] for result in results]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"results: got seeds {seeds}, wanted each seed once")
    first = settings_of(results[0])
    for result in results[1:]:
        other = settings_of(result)
        differing = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
        if differing:
            named = ", ".join(differing[:3])
            raise ValueError(
                f"results: seeds {seeds[0]} and {result['seed']} differ in {named}; wanted runs that differ in their seed"
            )


def check_result(result: Any, where: str = "results") -> None:
    """Raises a ValueError that begins with ``where`` unless ``result`` has the outline of a run's results."""
    checked_object(result, where)
    if result.get("format") != FORMAT:
        raise ValueError(f"{where}: got format {result.get('format')!r}, wanted {FORMAT}")
    models = [{"name": str, "kind": str, "metrics": dict}]
    checked_object(result, where, metric={"kind": str, "headline_step": int}, models=models, seed=int)
    if result["metric"]["kind"] not in ("accuracy", "loss"):
        raise ValueError(f"{where}: got metric {result['metric']['kind']!r}, wanted accuracy or loss")
    for entry in result["models"]:
        if entry["kind"] not in KINDS:
            raise ValueError(f"{where}: got a model of kind {entry['kind']!r}, wanted one of {', '.join(KINDS)}")
    if not result["models"]:
        raise ValueError(f"{where}: got a run without models, wanted at least one")


def settings_of(result: dict[str, Any]) -> dict[str, Any]:
    """Settings that must agree between seeds, as a flat dictionary with dotted keys.

    Those of a search decide which alphas there are, and not how their models are made.
    """
    own = ("seed", "output", "name", "workers", "parallel", *SEARCH_SETTINGS)
    config = {k: v for k, v in (result.get("config") or {}).items() if k not in own}
    metric = {k: v for k, v in result["metric"].items() if k in ("kind", "headline_step", "unit", "retain_margin")}
    return dict(_flat({**config, "metric": metric}, ""))


def unit_of(metric: dict[str, Any]) -> str:
    """Returns the unit of a loss; results of a run, whose models share a tokenizer, are in nats per token and do not say so."""
    return metric.get("unit", "nats/token")


def _flat(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, inner in value.items():
        yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
