"""A run: builds all stages of the graph and the attacks, whose grids can grow, then writes the results and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from undo_core import distributed
from undo_core.attacks.config import HEADLINE, check_installed
from undo_core.attacks.grid import worst_of
from undo_core.attacks.slowdown import slowdown_entry
from undo_core.evaluation.metrics import SCORES
from undo_core.io.files import hash_json, read_json, write_json
from undo_core.io.progress import console, shown_metrics
from undo_core.io.untrusted import read_object
from undo_core.pipeline.alpha_search import AlphaSearch, Outcome
from undo_core.pipeline.attacked_model import Attacked
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.costs import with_costs
from undo_core.pipeline.graph import Graph, Model, attacked_models, graph_of, measured_models, with_alphas
from undo_core.pipeline.prepared import evaluate_folder
from undo_core.pipeline.stage import Folder, Stage
from undo_core.pipeline.store import Store, load_warning, machine, versions
from undo_core.pipeline.workers import run_stages, use_threads
from undo_core.report import terminal_table, write_report
from undo_core.report.alpha_search import outcomes
from undo_core.report.results import FORMAT


def run(config: RunConfig, command: str) -> Path:
    """Builds the missing stages and writes the report; returns the path of ``report.html``.

    After an interruption, the same call continues where it stopped and ends with the same bits.
    """
    distributed.arrange(config.parallel)
    store, graph = Store(Path(config.output) / "stages"), graph_of(config)
    missing = lambda: missing_stages(store, config, graph)  # noqa: E731
    build_all(store, _configured(config, graph), missing, config.workers, lambda stage: announce(store, stage))
    return distributed.on_first(lambda: finish(store, config, graph, command))


def build_all(
    store: Store,
    configured: Iterable[Stage],
    missing: Callable[[], list[Stage]],
    workers: int,
    finished: Callable[[Stage], None],
) -> None:
    """Builds what ``missing`` returns, on all ranks, until it returns nothing: attack grids can grow.

    If there is anything to build on a busy machine, it says so first.

    Args:
        store: store in which the stages are built.
        configured: all stages that are known before anything runs, whose settings are checked first.
        missing: stages that are still to be built.
        workers: number of processes, if there is one rank.
        finished: called with each stage that was built.
    """
    if distributed.count() > 1:
        for stage in configured:
            stage.check_ranks(distributed.count())
        if workers > 1:
            console.print(f"workers: {workers} is not used: all {distributed.count()} ranks build one stage at a time")
            workers = 1
    distributed.on_first(store.tidy)
    busy = load_warning(workers)
    while stages := distributed.on_first(missing):
        if busy and distributed.rank() == 0:
            console.print(busy)
        busy = ""
        run_stages(store, stages, workers, finished)


def finish(store: Store, config: RunConfig, graph: Graph, command: str) -> Path:
    """Writes the results and the report of a run whose stages are complete; returns the path of ``report.html``."""
    results = save_results(store, config, graph, command)
    report = write_report([results], Path(config.output) / "report", config.name)
    console.print(terminal_table([results]))
    console.print(str(report))
    return report


def missing_stages(store: Store, config: RunConfig, graph: Graph) -> list[Stage]:
    """The stages that a run still needs: models and configured attacks; once these are done, extensions of the attack grids.

    Then those of the next alpha, if a target of robustness is searched.
    """
    for settings in (config.relearn, *config.attacks.values()):
        for kind in settings.kinds:
            check_installed(kind)
    return _grown(store, config, graph)[1]


def searched(store: Store, config: RunConfig, graph: Graph) -> Graph:
    """The graph with the alphas that the search for a target of robustness has tried; the same without a search."""
    return _grown(store, config, graph)[0]


def _grown(store: Store, config: RunConfig, graph: Graph) -> tuple[Graph, list[Stage], dict[str, Any] | None]:
    """The graph with every alpha tried so far, the stages that it still needs, and the entry of the search in the results."""
    target, alphas = config.target_robustness, sorted(config.noise.alphas)
    while True:
        attacked = [entry for models in attacked_models(config, graph).values() for entry in models.values()]
        stages = unfinished(store, _configured(config, graph), attacked)
        if stages or target is None:
            return graph, stages, None
        limits = (config.alpha_resolution, config.alpha_tries, config.alpha_max)
        search = AlphaSearch(target, *limits, len(config.noise.alphas))
        following = search.following(_outcomes(store, config, graph))
        if isinstance(following, str):
            entry = {**dataclasses.asdict(search), "tried": alphas, "ended": following}
            return graph, [], entry
        alphas.append(following)
        graph = with_alphas(graph, config, alphas)


def _outcomes(store: Store, config: RunConfig, graph: Graph) -> dict[float, Outcome]:
    """R of each alpha as the report gives it, without an evaluation of the models before the attack."""
    entries = [
        {
            **{"name": model.name, "kind": model.kind, "alpha": model.alpha, "stage": model.stage.name, "metrics": {}},
            "training": _training(store, graph, model),
            **_attacks(store, config, graph, model),
        }
        for model in graph.models
    ]
    metric = metric_of(store, config, graph)
    metric.pop(
        "retain_margin", None
    )  # R does not need it, and the worst case within a margin needs the evaluations before the attack
    results = {"format": FORMAT, "seed": config.seed, "metric": metric, "models": entries}
    return outcomes(results)


def unfinished(store: Store, configured: Iterable[Stage], attacked: Iterable[Attacked]) -> list[Stage]:
    """The stages that are not built; once all are, the extensions of the attacks' grids."""
    return [stage for stage in configured if not store.done(stage)] or [
        stage for entry in attacked for stage in entry.extension(store)
    ]


def _configured(config: RunConfig, graph: Graph) -> list[Stage]:
    """The stages of all models and of the configured attacks."""
    attacked = [entry for models in attacked_models(config, graph).values() for entry in models.values()]
    measured = [stage for models in measured_models(config, graph).values() for stage in models.values()]
    return graph.stages() + [stage for entry in attacked for stage in entry.stages()] + measured


def save_results(store: Store, config: RunConfig, graph: Graph, command: str) -> dict[str, Any]:
    """Evaluates the models of a run whose stages are complete, writes ``results-seedN.json`` and returns its content."""
    use_threads(1)
    graph, _, search = _grown(store, config, graph)
    models = with_costs([_entry(store, config, graph, model) for model in graph.models], config.pretrain.tokens)
    results = {
        **results_file(config.name, config.seed, command, dataclasses.asdict(config), metric_of(store, config, graph), models),
        **({} if search is None else {"alpha_search": search}),
    }
    if slowdown := slowdown_entry(results):
        results["slowdown"] = slowdown
    path = Path(config.output) / f"results-seed{config.seed}.json"
    if not (path.exists() and hash_json(read_json(path)) == hash_json(results)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, results)
    return results


def results_file(
    name: str, seed: int, command: str, settings: dict[str, Any], metric: dict[str, Any], models: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the content of a results file: what ran, with which settings and on which machine, and the models' entries."""
    return {
        "format": FORMAT,
        "name": name,
        "seed": seed,
        "command": command,
        "versions": versions(),
        "machine": machine(),
        "config": settings,
        "metric": metric,
        "models": models,
    }


def announce(store: Store, stage: Stage) -> None:
    """Prints a line about a stage that was just built."""
    console.print(stage_summary(stage, store.manifest(stage)))


def stage_summary(stage: Stage, facts: dict[str, Any]) -> str:
    """One line about a stage that was just built; an attack is measured on the test split, a training on the validation split."""
    notes = [f"{facts['seconds']:.1f} s"]
    if "steps" in facts:
        notes.insert(0, f"{facts['steps']} steps")
        last = facts["history"][-1] if facts["history"] else {}
        split = "" if "curve" in facts else "valid "
        shown = shown_metrics(stage.title, {f"{split}{name}": last[name] for name in ("retain", "forget") if name in last})
        notes += [shown] if shown else []
    if facts.get("limit_reached"):
        notes.append("LIMIT REACHED before the stop rule was satisfied")
    return f"  {stage.title:<22} {'  '.join(notes)}"


def metric_of(store: Store, config: RunConfig, graph: Graph) -> dict[str, Any]:
    """How a results file's performances are measured: their kind, the retain target, the headline step and the sequences."""
    splits = store.manifest(graph.prepared)["splits"]
    targets = [store.manifest(m.stage).get("retain_target") for m in graph.models]
    return {
        "kind": config.data.metric,
        "headline_step": config.relearn.headline_step,
        "retain_target": next((t for t in targets if t is not None), None),
        "eval_splits": {name: facts["rows"] for name, facts in splits.items() if not name.startswith("train")},
        **margin_entry(config.retain_margin),
    }


def margin_entry(margin: float | None) -> dict[str, float]:
    """The entry of ``metric`` in the results for the margin of the second worst case; empty without one."""
    return {} if margin is None else {"retain_margin": margin}


def _entry(store: Store, config: RunConfig, graph: Graph, model: Model) -> dict[str, Any]:
    entry = {
        "name": model.name,
        "kind": model.kind,
        "alpha": model.alpha,
        "stage": model.stage.name,
        "metrics": evaluation(store, model.stage, graph.prepared),
        **damage_entry(store, model),
        "training": _training(store, graph, model),
        **_attacks(store, config, graph, model),
    }
    if model.attacked and (config.attacks or config.retain_margin is not None):
        entry["worst"] = worst_of(entry, metric_of(store, config, graph))
    if config.measures:
        entry["measures"] = _measures(store, config, graph, model)
    return entry


def _attacks(store: Store, config: RunConfig, graph: Graph, model: Model) -> dict[str, Any]:
    """The entries of the headline attack on a model and, if there are any, of further attacks."""
    under = {name: models[model.name] for name, models in attacked_models(config, graph).items() if model.attacked}
    entry: dict[str, Any] = {"attack": under[HEADLINE].entry(store) if under else None}
    if under and config.attacks:
        entry["attacks"] = {name: under[name].named_entry(store) for name in config.attacks}
    return entry


def _measures(store: Store, config: RunConfig, graph: Graph, model: Model) -> dict[str, Any]:
    """The curves of a model's measures, each with its number and what it shows."""
    found = {}
    for name, models in measured_models(config, graph).items():
        if model.name in models:
            stage, measurement = models[model.name], config.measures[name]
            points = store.manifest(stage)["points"]
            curve = [(point["at"], point["value"]) for point in points]
            shown = {key: getattr(measurement, key) for key in ("kind", "axis", "value", "summary")}
            shown["text"] = measurement.text if measurement.reads else None
            number = measurement.number(curve, config.data.metric == "accuracy")
            found[name] = {**shown, "stage": stage.name, "number": number, "points": points}
    return found


def damage_entry(store: Store, model: Model) -> dict[str, Any]:
    """Entries about the damage of the model's student for the results; empty for a model that was not distilled."""
    student = model.training.inputs.get("student")
    return {} if student is None else student.results(store.manifest(student))


def evaluation(store: Store, stage: Stage, prepared: Stage) -> dict[str, Any]:
    """A model's metrics, computed once and stored beside the stages."""
    path = _evaluated(store, stage, prepared)
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, evaluate_folder(store.folder(stage), store.folder(prepared)))
    return read_object(path, SCORES)


def evaluations(store: Store, graph: Graph) -> list[tuple[Stage, Stage]]:
    """The models of a run that are still to be evaluated for its results, each with its prepared data."""
    pairs = ((model.stage, graph.prepared) for model in graph.models)
    return [pair for pair in pairs if not _evaluated(store, *pair).exists()]


def _evaluated(store: Store, stage: Stage, prepared: Stage) -> Path:
    return store.root.parent / "evaluations" / f"{stage.key}-{prepared.key}.json"


def _lineage(stage: Stage | Folder | None) -> Iterator[str]:
    """Yields the keys of a stage and of those whose model it changed, one after the other."""
    while stage is not None:
        yield stage.key
        stage = stage.inputs.get("model")


def _training(store: Store, graph: Graph, model: Model) -> dict[str, Any] | None:
    facts = store.manifest(model.training)
    if "steps" not in facts:
        return None
    ruled, inputs, teacher = facts["stopped"] is not None, model.training.inputs, graph.teacher
    tokens, flops, unlearning, chain = facts["tokens"], facts["flops"], 0, [facts]
    taught = teacher.key in _lineage(inputs.get("teacher"))
    if taught:  # the cost of the method includes unlearning the teacher
        suppressed = store.manifest(teacher)
        tokens, flops, unlearning = tokens + suppressed["tokens"], flops + suppressed["flops"], suppressed["tokens"]
        unlearning = unlearning * facts["steps"] / facts["tokens"] if facts["tokens"] else 0
        chain.append(suppressed)
        if cache := inputs.get("cache"):  # the teacher's forward passes
            chain.append(store.manifest(cache))
            flops += chain[-1]["flops"]
    stopped = facts["stopped"] if ruled else None
    source = teacher if taught or model.training.key == teacher.key else inputs.get("gate")
    labelled = {} if source is None else store.manifest(source)
    return {
        "steps": facts["steps"],
        "tokens": tokens,
        "flops": flops,
        "seconds": facts["seconds"],
        "limit_reached": facts["limit_reached"],
        # In steps with as many tokens as the student's. The tokens and FLOPs above already include the unlearning.
        "unlearning_steps": unlearning,
        "stop_step": facts["steps"] if stopped else None,
        "stop_tokens": tokens if stopped else None,
        "stop_flops": flops if stopped else None,
        "labelled_forget_tokens": labelled.get("labelled_forget_tokens"),
        "labelled_retain_tokens": labelled.get("labelled_retain_tokens"),
        "labelled_distinct_tokens": labelled.get("labelled_distinct_tokens"),
        "peak_bytes": facts["peak_bytes"],
        # As the tokens and FLOPs: with the unlearning and the cache of a student that the unlearned model teaches.
        "chain": {
            "steps": sum(part.get("steps", 0) for part in chain),
            "seconds": sum(part["seconds"] for part in chain),
            "peak_bytes": max(part["peak_bytes"] for part in chain),
        },
        "history": facts["history"],
    }
