"""The whole method, run: every stage of the graph, the growing attacks, the results and the report."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from undo_core.config import RunConfig
from undo_core.costs import with_costs
from undo_core.files import hash_json, read_json, write_json
from undo_core.graph import Model, Plan, attack_stage, plan_run
from undo_core.relearn import extension_of
from undo_core.report import terminal_table, write_report
from undo_core.stages import FUNCTIONS, evaluate_folder
from undo_core.store import Stage, Store, machine, versions
from undo_core.training.progress import console
from undo_core.workers import run_stages, use_threads

RESULTS_FORMAT = 1


def run(config: RunConfig, command: str) -> Path:
    """Run everything that is not there yet and report; returns the path of ``report.html``.

    Killed at any moment, the same call continues, and ends with the same bits.
    """
    store = Store(Path(config.output) / "stages", FUNCTIONS)
    plan = plan_run(config)
    while stages := missing_stages(store, config, plan):
        run_stages(store, stages, config.workers, lambda stage: announce(store, stage))
    results = save_results(store, config, plan, command)
    report = write_report([results], Path(config.output) / "report", config.name)
    console.print(terminal_table([results]))
    console.print(str(report))
    return report


def missing_stages(store: Store, config: RunConfig, plan: Plan) -> list[Stage]:
    """What a run lacks: models and attacks; once they are there, the attacks by which its grids grow."""
    wanted = [stage for stage in plan.stages() + _attacks(config, plan) if not store.done(stage)]
    return wanted or _extensions(store, config, plan)


def save_results(store: Store, config: RunConfig, plan: Plan, command: str) -> dict[str, Any]:
    """Evaluate the models of a run that lacks no stage; returns what ``results-seedN.json`` in its output folder then holds."""
    use_threads(1)
    results = {
        "format": RESULTS_FORMAT,
        "name": config.name,
        "seed": config.seed,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "config": dataclasses.asdict(config),
        "metric": _metric(store, config, plan),
        "models": with_costs([_entry(store, config, plan, model) for model in plan.models], config.pretrain.tokens),
    }
    path = Path(config.output) / f"results-seed{config.seed}.json"
    if not (path.exists() and hash_json(read_json(path)) == hash_json(results)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    return results


def announce(store: Store, stage: Stage) -> None:
    """Print a line about a stage that was just built."""
    console.print(_summary(stage, store.manifest(stage)))


def _summary(stage: Stage, facts: dict[str, Any]) -> str:
    """One line about a stage that was just built."""
    notes = [f"{facts['seconds']:.1f} s"]
    if "steps" in facts:
        notes.insert(0, f"{facts['steps']} steps")
        last = facts["history"][-1]
        notes += [f"{name} {last[name]:.3f}" for name in ("retain", "forget") if name in last]
    if facts.get("limit_reached"):
        notes.append("LIMIT REACHED before the stop rule was satisfied")
    return f"  {stage.title:<22} {'  '.join(notes)}"


def _metric(store: Store, config: RunConfig, plan: Plan) -> dict[str, Any]:
    splits = store.manifest(plan.prepared)["splits"]
    targets = [store.manifest(m.stage).get("retain_target") for m in plan.models]
    return {
        "kind": "loss" if config.data.kind == "text" else "accuracy",
        "headline_step": config.relearn.headline_step,
        "retain_target": next((t for t in targets if t is not None), None),
        "eval_splits": {name: facts["rows"] for name, facts in splits.items() if not name.startswith("train")},
    }


def _entry(store: Store, config: RunConfig, plan: Plan, model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "kind": model.kind,
        "alpha": model.alpha,
        "stage": model.stage.name,
        "metrics": _evaluation(store, plan, model),
        **_damage(store, model),
        "training": _training(store, plan, model),
        "attack": _attack(store, config, plan, model) if model.attacked else None,
    }


def _damage(store: Store, model: Model) -> dict[str, Any]:
    """How a student was damaged, where it was otherwise than by the noise."""
    student = model.stage.inputs.get("student")
    if student is None or student.kind != "damage":
        return {}
    facts = store.manifest(student)
    damage = {name: facts[name] for name in ("strength", "distance", "wanted")}
    return {"damage": {"operator": student.settings["operator"], **damage}}


def _evaluation(store: Store, plan: Plan, model: Model) -> dict[str, Any]:
    """The model's metrics, computed once and kept beside the stages."""
    path = store.root.parent / "evaluations" / f"{model.stage.key}-{plan.prepared.key}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, evaluate_folder(store.folder(model.stage), store.folder(plan.prepared)))
    return read_json(path)


def _training(store: Store, plan: Plan, model: Model) -> dict[str, Any] | None:
    facts = store.manifest(model.stage)
    if "steps" not in facts:
        return None
    ruled = facts["stopped"] is not None
    tokens, flops = facts["tokens"], facts["flops"]
    teacher, inputs = next(m.stage for m in plan.models if m.kind == "unlearn"), model.stage.inputs
    taught = "teacher" in inputs and inputs["teacher"].key == teacher.key
    if taught:  # what the method costs includes suppressing the capability
        suppressed = store.manifest(teacher)
        tokens, flops = tokens + suppressed["tokens"], flops + suppressed["flops"]
        if "cache" in model.stage.inputs:  # the teacher's forwards, once
            flops += store.manifest(model.stage.inputs["cache"])["flops"]
    stopped = facts["stopped"] if ruled else None
    source = teacher if taught or model.kind == "unlearn" else inputs.get("gate")
    labelled = {} if source is None else store.manifest(source)
    return {
        "steps": facts["steps"],
        "tokens": tokens,
        "flops": flops,
        "seconds": facts["seconds"],
        "limit_reached": facts["limit_reached"],
        "stop_step": facts["steps"] if stopped else None,
        "stop_tokens": tokens if stopped else None,
        "stop_flops": flops if stopped else None,
        "labelled_forget_tokens": labelled.get("labelled_forget_tokens"),
        "labelled_retain_tokens": labelled.get("labelled_retain_tokens"),
        "labelled_distinct_tokens": labelled.get("labelled_distinct_tokens"),
        "peak_bytes": facts["peak_bytes"],
        "history": facts["history"],
    }


def _attacks(config: RunConfig, plan: Plan) -> list[Stage]:
    """The attacks of the configured grid, on every attacked model."""
    return [attack_stage(config, plan, model, rate) for model in plan.models if model.attacked for rate in config.relearn.rates]


def _extensions(store: Store, config: RunConfig, plan: Plan) -> list[Stage]:
    """The attacks by which the grids still have to grow."""
    limit = len(config.relearn.rates) + config.relearn.extend
    grids = [(model, *_grid(store, config, plan, model)) for model in plan.models if model.attacked]
    return [
        attack_stage(config, plan, model, beyond) for model, rates, beyond in grids if beyond is not None and len(rates) < limit
    ]


def _grid(store: Store, config: RunConfig, plan: Plan, model: Model) -> tuple[list[float], float | None]:
    """The rates attacked so far, configured and added, and the next one where the worst of them is an end of the grid."""
    attack, rates = config.relearn, list(config.relearn.rates)
    while True:
        headline = {}
        for rate in rates:
            curve = store.manifest(attack_stage(config, plan, model, rate))["curve"]
            headline[rate] = next(point["forget"]["value"] for point in curve if point["step"] == attack.headline_step)
        beyond = extension_of(headline, higher_is_better=config.data.kind != "text")
        if beyond is None or len(rates) == len(attack.rates) + attack.extend:
            return rates, beyond
        if not store.done(attack_stage(config, plan, model, beyond)):
            return rates, beyond
        rates.append(beyond)


def _attack(store: Store, config: RunConfig, plan: Plan, model: Model) -> dict[str, Any]:
    """The curves of the attacks on one model."""
    rates, beyond = _grid(store, config, plan, model)
    stages = {rate: attack_stage(config, plan, model, rate) for rate in sorted(rates)}
    curves = {rate: store.manifest(stage)["curve"] for rate, stage in stages.items()}
    return {
        "rates": sorted(rates),
        "steps": config.relearn.evaluate_at,
        "extended": len(rates) > len(config.relearn.rates),
        "worst_at_end_of_grid": beyond is not None,
        "curves": [
            {"rate": rate, "stage": stages[rate].name, **{name: [p[name] for p in curve] for name in ("forget", "retain")}}
            for rate, curve in curves.items()
        ],
    }
