"""The whole method as a graph of stages: prepare, pretrain, unlearn, noise, distill, relearn, evaluate, report."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undo_core.config import DataConfig, ModelConfig, RunConfig, derive_seed
from undo_core.files import hash_file, hash_json, read_json, write_json
from undo_core.relearn import extension_of
from undo_core.report import terminal_table, write_report
from undo_core.stages import FUNCTIONS, evaluate_folder
from undo_core.store import Stage, Store, machine, versions
from undo_core.training.progress import console
from undo_core.workers import run_stages, use_threads

RESULTS_FORMAT = 1


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        name: unique within the run.
        kind: original, unlearn, undo, random, filter or oracle.
        stage: whose folder holds it.
        alpha: strength of the noise, for undo.
    """

    name: str
    kind: str
    stage: Stage
    alpha: float | None = None

    @property
    def attacked(self) -> bool:
        """The original has the capability; there is nothing to relearn."""
        return self.kind != "original"


@dataclass(frozen=True)
class Plan:
    """The models of a run and the prepared data that they share."""

    prepared: Stage
    models: list[Model]

    def stages(self) -> list[Stage]:
        """Every stage but the attacks, each once, inputs first."""
        found: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            for source in stage.inputs.values():
                visit(source)
            found.setdefault(stage.key, stage)

        for model in self.models:
            visit(model.stage)
        return list(found.values())


def plan_run(config: RunConfig) -> Plan:
    """The stages of a run, from its configuration alone; nothing is computed.

    Raises:
        FileNotFoundError: a data file or a checkpoint folder that the configuration names is missing.
    """
    seed = config.seed

    def seeded(settings: Any, name: str) -> dict[str, Any]:
        return _seeded(settings, seed, name)

    prepared = prepare_stage(config.data, config.model, seed)
    if config.model.path:
        original = prepared
    else:
        rule = {"stop_retain": config.pretrain.stop_retain, "stop_forget": config.pretrain.stop_forget}
        settings = {"train": seeded(config.pretrain.train, "pretrain"), "splits": ["retain", "forget"], **rule}
        original = Stage("pretrain", settings, {"prepared": prepared}, "pretrain")

    unlearn = dataclasses.asdict(config.unlearn)
    unlearn["train"] = seeded(config.unlearn.train, "unlearn")
    teacher = Stage("unlearn", unlearn, {"prepared": prepared, "model": original}, f"unlearn {config.unlearn.method}")

    train = seeded(config.distill.train, "distill")

    how = _teacher_settings(config)
    cache = cache_stage(how, prepared, teacher)

    def distilled(student: Stage, title: str, source: Stage = teacher, **changes: Any) -> Stage:
        settings = {"train": train, "recover": config.distill.recover, **how, **changes}
        inputs = {"prepared": prepared, "teacher": source, "student": student}
        if cache is not None and source is teacher:
            inputs["cache"] = cache
        return Stage("distill", settings, inputs, title)

    models = [Model("original", "original", original), Model("unlearn", "unlearn", teacher)]
    noise_seed = config.noise.seed if config.noise.seed is not None else derive_seed(seed, "noise")
    for alpha in sorted(config.noise.alphas):
        settings = {"alpha": alpha, "beta": config.noise.beta, "law": config.noise.law, "seed": noise_seed}
        if config.noise.std is not None:
            settings["std"] = config.noise.std
        if config.noise.rules:
            settings["rules"] = [dataclasses.asdict(rule) for rule in config.noise.rules]
        damaged = Stage("noise", settings, {"model": teacher}, f"noise {alpha:g}")
        models.append(Model(f"undo-{alpha:g}", "undo", distilled(damaged, f"distill {alpha:g}"), alpha))
    if config.controls.random:
        student = Stage("initialise", {"seed": derive_seed(seed, "random student")}, {"model": prepared}, "random student")
        models.append(Model("random", "random", distilled(student, "distill random")))
    if config.controls.filter:
        # C compares steps to one target, so both are counted at one batch size and evaluation interval.
        counted = {"batch_size": config.distill.train.batch_size, "eval_every": config.distill.train.eval_every}
        filter_train = dataclasses.replace(config.pretrain.train, **counted)
        settings = {"train": seeded(filter_train, "filter"), "splits": ["retain"], "recover": config.distill.recover}
        filtered = Stage("pretrain", settings, {"prepared": prepared, "target": teacher}, "data filtering")
        models.append(Model("filter", "filter", filtered))
        if config.controls.oracle_steps:
            changes = {"train": {**train, "steps": config.controls.oracle_steps}, "recover": None}
            if cache is not None:  # its teacher has this one student
                changes["teacher"] = {"kind": "streamed"}
            models.append(Model("oracle", "oracle", distilled(original, "distill oracle", source=filtered, **changes)))
    return Plan(prepared, models)


def _teacher_settings(config: RunConfig) -> dict[str, Any]:
    """Where the teacher is, for a distillation's key: what of the settings has a say."""
    teacher = config.distill.teacher
    if teacher.kind == "resident":
        return {}
    chosen = {"kind": teacher.kind}
    if teacher.kind == "cached":
        chosen["dtype"] = teacher.dtype
    if teacher.kind == "topk":
        chosen["k"] = teacher.k
    if teacher.kind in ("cached", "topk"):
        train = config.distill.train
        chosen["batch_size"] = teacher.batch_size or train.micro_batch_size or train.batch_size
    return {"teacher": chosen}


def cache_stage(how: dict[str, Any], prepared: Stage, teacher: Stage) -> Stage | None:
    """The stage that runs the teacher once for all its students, where the settings ask for one."""
    settings = how.get("teacher", {})
    if settings.get("kind") not in ("cached", "topk"):
        return None
    return Stage("cache", settings, {"prepared": prepared, "teacher": teacher}, "cache teacher")


def prepare_stage(data: DataConfig, model: ModelConfig, seed: int) -> Stage:
    """The stage that draws the data and initialises the model; the files that it reads are part of its key.

    Raises:
        FileNotFoundError: a data file or the checkpoint folder is missing.
    """
    settings = {"data": _seeded(data, seed, "data"), "model": _seeded(model, seed, "model")}
    files = [Path(path) for path in data.sources() if "://" not in path]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"data: got {path}, which is not a file; check data.retain, data.forget and data.distill.sources"
            )
    if model.path:
        settings["data"]["tokenizer"] = data.tokenizer or model.path
        checkpoint = Path(model.path)
        if not (checkpoint / "config.json").is_file():
            raise FileNotFoundError(
                f"model.path: got {checkpoint}, which has no config.json; wanted a Hugging Face checkpoint folder"
            )
        files += [checkpoint / "config.json", *sorted(checkpoint.glob("*.safetensors"))]
    return Stage("prepare", {**settings, "files": {str(path): hash_file(path) for path in files}}, title="prepare")


def _seeded(settings: Any, seed: int, name: str) -> dict[str, Any]:
    """Settings as JSON values, with the stage's seed derived from the run's where it names none."""
    values = dataclasses.asdict(settings)
    if values["seed"] is None:
        values["seed"] = derive_seed(seed, name)
    return values


def attack_stage(config: RunConfig, plan: Plan, model: Model, rate: float) -> Stage:
    """The attack on one model at one learning rate."""
    settings = dataclasses.asdict(config.relearn)
    for name in ("rates", "extend"):
        del settings[name]
    if settings["seed"] is None:
        settings["seed"] = derive_seed(config.seed, "relearn")
    inputs = {"prepared": plan.prepared, "model": model.stage}
    return Stage("relearn", {**settings, "rate": rate}, inputs, f"relearn {model.name} {rate:g}")


def run(config: RunConfig, command: str) -> Path:
    """Run everything that is not there yet and report; returns the path of ``report.html``.

    Killed at any moment, the same call continues, and ends with the same bits.
    """
    output = Path(config.output)
    store = Store(output / "stages", FUNCTIONS)
    plan = plan_run(config)

    def finished(stage: Stage) -> None:
        console.print(_summary(stage, store.manifest(stage)))

    run_stages(store, plan.stages() + _attacks(config, plan), config.workers, finished)
    while extensions := _extensions(store, config, plan):
        run_stages(store, extensions, config.workers, finished)
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
        "models": [_entry(store, config, plan, model) for model in plan.models],
    }
    path = output / f"results-seed{config.seed}.json"
    report = output / "report" / "report.html"
    if not (path.exists() and report.exists() and hash_json(read_json(path)) == hash_json(results)):
        write_json(path, results)
        write_report([results], report.parent, config.name)
    console.print(terminal_table([results]))
    console.print(str(report))
    return report


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
        "training": _training(store, plan, model),
        "attack": _attack(store, config, plan, model) if model.attacked else None,
    }


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
    teacher = next(m.stage for m in plan.models if m.kind == "unlearn")
    if model.kind in ("undo", "random"):  # what the method costs includes suppressing the capability
        suppressed = store.manifest(teacher)
        tokens, flops = tokens + suppressed["tokens"], flops + suppressed["flops"]
        if "cache" in model.stage.inputs:  # the teacher's forwards, once
            flops += store.manifest(model.stage.inputs["cache"])["flops"]
    stopped = facts["stopped"] if ruled else None
    labelled = store.manifest(teacher) if model.kind in ("unlearn", "undo", "random") else {}
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
