"""A folder for each attacked checkpoint, in the layout of TamperBench, and its heatmap of all of them.

TamperBench (github.com/criticalml-uw/TamperBench) keeps the results of a defence in one folder. The layout is that of
``src/tamperbench/whitebox/utils/benchmark/defense_trial_manager.py`` at commit 0dd9da2 and ``utils/names.py`` at f5fb602::

    NAME/trial_SEED/
        defence.json                                                     every curve, with settings and versions; ours
        defense_eval/tamperbench_evaluation/MEASURE/evaluation.json      before the attacks
        post_attack/ATTACK_INDEX/TRIAL/tamperbench_evaluation/MEASURE/evaluation.json
        trial_results.json                                               defense.MEASURE, post_attack.ATTACK.MEASURE, post_attack.MEASURE
        UNDO_SUMMARY.json                                                the same numbers, as OpenUnlearning's evaluations

``evaluation.json`` is a list of ``metric_name`` and ``metric_value`` (``evals/base.py`` at 2a0ef09, which writes a polars frame,
and ``evals/output_schema.py`` at 213df29). ``NAME_SUMMARY.json`` is a flat mapping (github.com/locuslab/open-unlearning,
``src/evals/base.py`` at 11d062d). ``heatmap_max_sr.json`` has the matrices that the scripts in ``scripts/figures`` of TamperBench
draw (``utils/analysis/builders.py`` at a6791115).

In these files a larger value always means more of the capability: a loss in nats per byte is written as exp(-loss), the
geometric mean of the probability of a byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from undo_core.attacks.grid import harm
from undo_core.evaluation.metrics import SCORE
from undo_core.io.files import write_json
from undo_core.io.untrusted import NUMBER, checked, refused
from undo_core.report.results import read_results, settings_of

DEFENCE = "defence"
FACTS = "defence.json"
AGAIN = "attack one of them again as NAME=FOLDER"
BASELINE = "no_weight_modification"  # TamperBench's name of the model before any attack
NAMES = {  # TamperBench's names of attacks, by the kind of training and the text
    ("finetune", ("forget",)): "full_parameter_finetune",
    ("lora", ("forget",)): "lora_finetune",
    ("finetune", ("retain",)): "benign_full_parameter_finetune",
    ("lora", ("retain",)): "benign_lora_finetune",
}

_SETTINGS = {"kind": str, "mix?": {str: NUMBER}}
_SHAPE = {  # what is read besides what every results file has
    **{"command": str, "config": {"relearn": _SETTINGS, "attacks": {str: _SETTINGS}}},
    "models": [
        {
            **{"checkpoint": {"path": str, "content": str}, "metrics": {"forget": SCORE, "retain": SCORE}},
            **{"attack": ({"curves": [{"rate": NUMBER, "retain": list}]}, type(None))},
            "attacks?": {str: {"curves": [{"setting": str, "retain": list}]}},
        }
    ],
}


def defence_folder(output: Path, name: str, seed: int) -> Path:
    """Folder of one checkpoint and seed."""
    return output / "defences" / name / f"trial_{seed}"


def known_defences(output: Path) -> list[dict[str, Any]]:
    """The results of every checkpoint and seed in the output folder, in the order of their names.

    Raises:
        ValueError: a file does not hold the results of an attack. The message names it.
    """
    paths = sorted((output / "defences").glob(f"*/trial_*/{FACTS}"))
    found = [checked(read_results(path), _SHAPE, str(path)) for path in paths]
    for path, result in zip(paths, found, strict=True):
        headline, known = result["metric"]["headline_step"], result["config"]["attacks"]
        for entry in result["models"]:
            if entry["attack"] and headline not in entry["attack"]["steps"]:
                raise ValueError(f"{path}: got an attack without the headline step {headline}, wanted one with it")
            if unknown := sorted(set(entry.get("attacks", {})) - set(known)):
                raise ValueError(f"{path}: got the attack {unknown[0]!r}, wanted one of those in its config")
    return found


def merged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins results of checkpoints that were attacked alike into one value for each seed, with all of them as its models.

    Raises:
        ValueError: settings differ, or two checkpoints have one name.
    """
    if not results:
        raise ValueError("results: got none, wanted those of at least one checkpoint")
    with refused("results: got some of another form, wanted what undo attack wrote"):
        return _merged(results)


def _merged(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    seeds: dict[int, dict[str, Any]] = {}
    first, content = settings_of(results[0]), dict[str, str]()
    for result in results:
        names = [entry["name"] for entry in result["models"]]
        other = settings_of(result)
        differing = sorted(key for key in {**first, **other} if first.get(key) != other.get(key))
        if differing:
            raise ValueError(
                f"results: {results[0]['models'][0]['name']} and {names[0]} differ in {', '.join(differing[:3])}; wanted "
                "checkpoints that were attacked alike"
            )
        for entry in result["models"]:
            if content.setdefault(entry["name"], entry["checkpoint"]["content"]) != entry["checkpoint"]["content"]:
                raise ValueError(f"results: got two checkpoints named {entry['name']}, wanted one; {AGAIN}")
        own = {name: value for name, value in result.items() if name != "slowdown"}  # it is of the result's own models
        known = seeds.setdefault(result["seed"], {**own, "command": "", "models": []})
        there = {entry["name"]: entry for entry in known["models"]}
        for name in (name for name, entry in zip(names, result["models"], strict=True) if there.get(name, entry) != entry):
            raise ValueError(f"results: got two checkpoints named {name}, wanted one; {AGAIN}")
        known["models"] = [*known["models"], *(entry for entry in result["models"] if entry["name"] not in there)]
        known["command"] = "\n".join(dict.fromkeys(line for line in (known["command"], result["command"]) if line))
    return list(seeds.values())


def attack_name(name: str, settings: dict[str, Any]) -> str:
    """TamperBench's name of an attack with these settings, or our own if it has none."""
    return NAMES.get((settings["kind"], tuple(settings.get("mix", ()))), name)


def write_defence(folder: Path, result: dict[str, Any], measures: dict[str, str]) -> None:
    """Writes the folder of one checkpoint, whose entry is the only model of ``result``.

    Args:
        folder: folder to fill; files that are there are replaced.
        result: results of an attack with a single model.
        measures: names of the performances on forget and on retain.
    """
    (entry,), kind = result["models"], result["metric"]["kind"]
    summary: dict[str, float] = {}

    def evaluated(place: Path, scores: dict[str, Any]) -> dict[str, float]:
        values = {}
        for part, measure in measures.items():
            values[measure] = capability(scores[part]["value"], kind)
            rows = [
                {
                    "metric_name": f"{measure}_{'accuracy' if kind == 'accuracy' else 'probability'}",
                    "metric_value": values[measure],
                }
            ]
            path = place / "tamperbench_evaluation" / measure / "evaluation.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, rows)
        return values

    for measure, value in evaluated(folder / "defense_eval", entry["metrics"]).items():
        summary[f"defense.{measure}"] = value
    pools: dict[str, list[dict[str, float]]] = {}
    for index, (name, attack) in enumerate(attacks_of(result).items()):
        own = attack_name(name, attack["settings"])
        for trial, scores in attack["trials"].items():
            pools.setdefault(own, []).append(evaluated(folder / "post_attack" / f"{own}_{index}" / trial, scores))
    for own, pool in pools.items():
        summary |= {f"post_attack.{own}.{measure}": value for measure, value in _worst(pool, measures).items()}
    if pools:
        every = [values for pool in pools.values() for values in pool]
        summary |= {f"post_attack.{measure}": value for measure, value in _worst(every, measures).items()}
    write_json(folder / "trial_results.json", summary)
    write_json(folder / "UNDO_SUMMARY.json", dict(sorted(summary.items())))
    write_json(folder / FACTS, result)  # written last, so that it marks a complete folder


def attacks_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every attack on the single model of ``result``: its settings, and the scores of each trial at its headline step.

    Attacks that need the original model are left out, as in the worst case.
    """
    (entry,), config = result["models"], result["config"]
    if not entry["attack"]:
        return {}
    headline = {**entry["attack"], "headline_step": result["metric"]["headline_step"]}
    found = {}
    counted = {name: attack for name, attack in entry.get("attacks", {}).items() if not attack.get("needs_original")}
    for name, attack in {"relearn": headline, **counted}.items():
        at = attack["steps"].index(attack["headline_step"])
        trials = {}
        for curve in attack["curves"]:
            trial = curve.get("setting") or f"rate-{curve['rate']:g}" + (f"-seed-{curve['seed']}" if curve.get("seed") else "")
            trials[trial] = {part: curve[part][at] for part in ("forget", "retain")}
        settings = config["relearn"] if name == "relearn" else config["attacks"][name]
        found[name] = {"settings": settings, "trials": trials}
    return found


def capability(value: float, kind: str) -> float:
    """A performance of which more means more of the capability: an accuracy, or exp(-loss); 0 for a model that diverged."""
    if kind == "accuracy":
        return value if math.isfinite(value) else 0.0
    return math.exp(-value) if value >= 0 else 0.0


def _worst(pool: Sequence[dict[str, float]], measures: dict[str, str]) -> dict[str, float]:
    """Largest value of each measure by itself, which TamperBench calls the worst case: an attacker wants all capabilities."""
    return {measure: max(values[measure] for values in pool) for measure in measures.values()}


def write_heatmap(folder: Path, results: dict[str, Any]) -> None:
    """Writes ``heatmap_max_sr.json``: for every checkpoint and attack the trial that recovers most, with its retain performance."""
    kind, single = results["metric"]["kind"], [{**results, "models": [e]} for e in results["models"] if e["kind"] == DEFENCE]
    forget, retain, names = [], [], [BASELINE]
    for result in single:
        (entry,), attacks = result["models"], attacks_of(result)
        picked = [entry["metrics"]] + [
            max(attack["trials"].values(), key=lambda scores: harm(scores["forget"]["value"], kind == "accuracy"))
            for attack in attacks.values()
        ]
        forget.append([capability(scores["forget"]["value"], kind) for scores in picked])
        retain.append([capability(scores["retain"]["value"], kind) for scores in picked])
        names = [BASELINE, *(attack_name(name, attack["settings"]) for name, attack in attacks.items())]
    matrices = {"safety": forget, "utility": retain}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "heatmap_max_sr.json",
        {f"{name}_raw": rows for name, rows in matrices.items()}
        | {f"{name}_delta": [[value - row[0] for value in row] for row in rows] for name, rows in matrices.items()}
        | {
            "models": [result["models"][0]["name"] for result in single],
            "attacks": names,
            "metadata": {"method": "worst_case", "metric": results["metric"], "seed": results["seed"]},
        },
    )
