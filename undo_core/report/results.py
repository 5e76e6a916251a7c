"""The shape of a run's results, and the settings in which the runs of several seeds must agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from undo_core.attacks.search import TRIAL
from undo_core.evaluation.metrics import SCORE, SCORES
from undo_core.io.untrusted import NUMBER, OPTIONAL, Shape, checked, checked_object, read_object

FORMAT = 1
KINDS = ("original", "defence", "unlearn", "undo", "damaged", "gated", "random", "filter", "oracle", "oracle-random")
SEARCH_SETTINGS = ("target_robustness", "alpha_resolution", "alpha_tries", "alpha_max")

_NONE = type(None)
_CURVE = {"forget": [SCORE], "retain?": [SCORE], "rate?": OPTIONAL, "flops?": [NUMBER], "setting?": str, "stage?": str}
_ATTACK = {
    **{"steps": [int], "curves": [{**_CURVE, "point?": {str: (*NUMBER, str)}}], "headline_step?": int, "kind?": str},
    **{"needs_original?": bool, "trials?": [TRIAL], "best?": int, "spent_flops?": NUMBER},
}
_LABELLED = ({"forget": int, "retain": int}, _NONE)
_TRAINING = {
    **{"steps?": int, "tokens?": int, "flops?": NUMBER, "seconds?": NUMBER, "peak_bytes?": int, "limit_reached?": bool},
    **{"stop_step?": (int, _NONE), "stop_tokens?": OPTIONAL, "stop_flops?": OPTIONAL, "unlearning_steps?": NUMBER},
    **{"labelled_forget_tokens?": (int, _NONE), "labelled_retain_tokens?": (int, _NONE), "history?": [{str: NUMBER}]},
    "chain?": {"steps": int, "seconds": NUMBER, "peak_bytes": int},
}
_MEASURE = {
    **{"kind": str, "axis": str, "value": str, "summary": str, "text": (str, _NONE), "number": OPTIONAL},
    "points": [{"at": NUMBER, "value": OPTIONAL}],
}
_MODEL = {
    **{"name": str, "kind": str, "alpha?": OPTIONAL, "stage?": str, "training?": (_TRAINING, _NONE)},
    **{"metrics": SCORES, "attack?": (_ATTACK, _NONE), "attacks?": {str: _ATTACK}, "measures?": {str: _MEASURE}},
    "costs?": {"pretraining_tokens": (int, _NONE), "labelled_tokens": _LABELLED},
}
_SECTIONS = {  # of the settings, what reports read
    **{"noise?": {"alphas?": [NUMBER]}, "unlearn?": {"method?": str, "robust?": str, "retain_weight?": NUMBER}},
    **{"relearn?": {"batch_size?": int}, "attacks?": {str: dict}, "students?": {str: dict}, "distill?": {"train?": dict}},
    "data?": {"kind?": str, "length?": (int, _NONE), "questions?": (dict, _NONE)},
}
_SEARCH = {"target": NUMBER, "tried": [NUMBER], "configured": int, "ended": str}
RESULT: Shape = {  # what reports read; runs of other versions may have more
    **{"seed": int, "name?": str, "command?": str, "models": [_MODEL], "config?": _SECTIONS, "alpha_search?": _SEARCH},
    "metric": {"kind": str, "headline_step": int, "retain_target?": OPTIONAL, "retain_margin?": OPTIONAL, "unit?": str},
}


def read_results(path: Path) -> dict[str, Any]:
    """Returns the contents of a results file.

    Raises:
        ValueError: they are not those of a run or of an attack. It names the file.
    """
    return check_result(read_object(path), str(path))


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


def check_result(result: Any, where: str = "results") -> dict[str, Any]:
    """Returns ``result`` if it has the :data:`RESULT` shape of a run's results; a ValueError that begins with ``where`` if not."""
    checked_object(result, where)
    if result.get("format") != FORMAT:
        raise ValueError(f"{where}: got format {result.get('format')!r}, wanted {FORMAT}")
    checked(result, RESULT, where)
    if result["metric"]["kind"] not in ("accuracy", "loss"):
        raise ValueError(f"{where}: got metric {result['metric']['kind']!r}, wanted accuracy or loss")
    for entry in result["models"]:
        if entry["kind"] not in KINDS:
            raise ValueError(f"{where}: got a model of kind {entry['kind']!r}, wanted one of {', '.join(KINDS)}")
        for name, attack in {"attack": entry.get("attack"), **entry.get("attacks", {})}.items():
            if attack:
                _check_attack(attack, f"{where}: model {entry['name']!r}, attack {name!r}")
    if not result["models"]:
        raise ValueError(f"{where}: got a run without models, wanted at least one")
    alphas = {entry.get("alpha") for entry in result["models"] if entry["kind"] == "undo"}
    if lost := [alpha for alpha in result.get("alpha_search", {"tried": ()})["tried"] if alpha not in alphas]:
        raise ValueError(f"{where}: got an alpha_search that tried {lost[0]}, wanted alphas of models of kind undo")
    return result


def _check_attack(attack: dict[str, Any], where: str) -> None:
    """Raises a ValueError that begins with ``where`` unless an attack has curves, and each has an evaluation at each of its steps."""
    if not attack["curves"]:
        raise ValueError(f"{where}: got no curves, wanted at least one")
    for curve in [*attack["curves"], *attack.get("trials", [])]:
        steps = curve.get("steps", attack["steps"])
        lengths = {len(curve[part]) for part in ("forget", "retain", "flops") if part in curve}
        if lengths != {len(steps)} or not steps:
            raise ValueError(f"{where}: got a curve of {sorted(lengths)} evaluations, wanted one at each of the steps {steps}")
        if curve.get("best", 0) not in range(len(steps)):
            raise ValueError(f"{where}: got {curve['best']} as the best of {len(steps)} evaluations, wanted the index of one")
    if "headline_step" in attack and attack["headline_step"] not in attack["steps"]:
        raise ValueError(f"{where}: got the headline step {attack['headline_step']}, wanted one of the steps {attack['steps']}")
    trials = attack.get("trials")
    if trials is not None and attack.get("best", -1) not in range(len(trials)):
        raise ValueError(f"{where}: got {attack.get('best')} as the best of {len(trials)} trials, wanted the index of one")
    if trials is not None and "spent_flops" not in attack:
        raise ValueError(f"{where}: got trials without spent_flops, wanted the FLOPs of all of them")


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
