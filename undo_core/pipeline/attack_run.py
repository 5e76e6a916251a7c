"""Attacks checkpoints that were made anywhere, each with its own tokenizer, and reports them in one table.

The stages are those of a run: the text is prepared with the checkpoint's tokenizer, and each trial of an attack is a stage.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undo_core import distributed
from undo_core.attacks.config import HEADLINE, AttackConfig, check_installed, with_seed
from undo_core.attacks.grid import worst_of
from undo_core.attacks.interventions import Intervention
from undo_core.attacks.named import AnyAttack
from undo_core.attacks.search import settled_attacks
from undo_core.attacks.slowdown import slowdown_entry
from undo_core.data.text import split_bytes
from undo_core.io.files import hash_json, write_json
from undo_core.io.progress import Unit, console, shown_in
from undo_core.io.untrusted import read_object
from undo_core.models.config import ModelConfig
from undo_core.pipeline.attack_config import NAME, AttackRunConfig
from undo_core.pipeline.attacked_model import Attacked
from undo_core.pipeline.config import ControlsConfig, RunConfig, derive_seed
from undo_core.pipeline.run import announce, build_all, evaluation, margin_entry, results_file, unfinished
from undo_core.pipeline.stage import MANIFEST, Stage
from undo_core.pipeline.stages.prepare import Prepare, prepare_stage
from undo_core.pipeline.store import Store
from undo_core.pipeline.workers import use_threads
from undo_core.report import terminal_table, write_report
from undo_core.report.defences import DEFENCE, defence_folder, known_defences, merged, write_defence, write_heatmap
from undo_core.report.results import settings_of

INTERVAL = ("value", "low", "high")


@dataclass(frozen=True)
class Defence:
    """A checkpoint under every attack.

    Attributes:
        name: its row in the tables.
        prepared: stage that reads the checkpoint and prepares the text for it.
        attacks: the checkpoint under each attack, by the attack's name; empty for the original.
        reference: whether it never had the capability, so that the slowdown compares the others with it.
    """

    name: str
    prepared: Prepare
    attacks: dict[str, Attacked]
    reference: bool = False

    @property
    def kind(self) -> str:
        """Kind of the model in the results."""
        return DEFENCE if self.attacks else "original"

    def stages(self) -> list[Stage]:
        """The stages that are known before anything runs; attacks that train nothing come first, as they fail early."""
        ordered = sorted(self.attacks.values(), key=lambda attacked: attacked.config.trains)
        return [self.prepared, *(stage for attacked in ordered for stage in attacked.stages())]


def attack_checkpoints(checkpoints: Sequence[str], config: AttackRunConfig, command: str) -> Path:
    """Attacks every checkpoint, each ``FOLDER`` or ``NAME=FOLDER``, and returns the path of ``report.html``.

    After an interruption, the same call continues where it stopped. Checkpoints that an earlier call attacked with the same
    settings and output folder are in the report as well.

    Raises:
        FileNotFoundError: a checkpoint or a text file is missing.
        ValueError: two checkpoints have one name, or the output folder holds the results of a run, or checkpoints that were
            attacked in another way or on other text.
    """
    distributed.arrange(config.parallel)
    store = Store(Path(config.output) / "stages")
    defences = defences_of(checkpoints, config)
    distributed.on_first(lambda: _check_alike(config, defences))
    attacked = [entry for defence in defences for entry in defence.attacks.values()]
    stages = [stage for defence in defences for stage in defence.stages()]
    prepared = {defence.prepared.key for defence in defences}

    def finished(stage: Stage) -> None:
        announce(store, stage)
        if not config.keep and stage.key not in prepared:
            distributed.on_first(lambda: remove_weights(store.folder(stage)))

    with shown_in(_units(store, config, defences)):
        build_all(store, stages, lambda: unfinished(store, stages, attacked), config.workers, finished)
    return distributed.on_first(lambda: _finish(store, config, defences, command))


def defences_of(checkpoints: Sequence[str], config: AttackRunConfig) -> list[Defence]:
    """The checkpoints with the stages that attack them; nothing is computed. For errors see :func:`attack_checkpoints`."""
    named: dict[str, str] = {}
    original, reference = (given and named_checkpoint(given)[0] for given in (config.original, config.reference))
    for given in config.every(checkpoints):
        name, path = named_checkpoint(given)
        if name in named:
            raise ValueError(
                f"checkpoints: got {named[name]} and {path}, both named {name}; wanted NAME={path} with another name"
            )
        named[name] = path
    every = settled_attacks(config.relearn, config.envelope())
    settings = {name: _unsaved(own, config.keep) for name, own in every.items()}
    for attack, own in settings.items():
        if isinstance(own, Intervention) and own.needs_original and original is None:
            raise ValueError(
                f"attacks.{attack}.kind: got {own.kind}, which needs the original model; wanted --original=CHECKPOINT with it"
            )
        try:
            for kind in own.kinds:
                check_installed(kind)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"attacks.{attack}.{error}, or pass --attacks={{}} for the headline attack alone"
            ) from None
    seed, higher = derive_seed(config.seed, HEADLINE), config.data.metric == "accuracy"
    prepares = {
        name: dataclasses.replace(prepare_stage(config.data, ModelConfig(path=path), config.seed), title=f"prepare {name}")
        for name, path in named.items()
    }
    defences = []
    for name, prepared in prepares.items():
        under = {} if name == original else settings
        attacks = {
            attack: Attacked(with_seed(own, seed), prepared, prepared, f"{attack} {name}", higher, prepares.get(original or ""))
            for attack, own in under.items()
        }
        defences.append(Defence(name, prepared, attacks, name == reference))
    return defences


def _unsaved(settings: AnyAttack, keep: bool) -> AnyAttack:
    """The settings of an attack, without weights that would be removed again where several trials share a folder."""
    shared = isinstance(settings, AttackConfig) and settings.together > 1
    return dataclasses.replace(settings, save=False) if shared and not keep else settings


def named_checkpoint(given: str) -> tuple[str, str]:
    """Splits ``NAME=FOLDER``; a folder alone is named after itself."""
    name, equals, path = given.partition("=")
    if not equals or Path(given).is_dir():
        name, path = Path(os.path.abspath(given)).name, given
    if not NAME.fullmatch(name):
        raise ValueError(
            f"checkpoints: got the name {name!r}, wanted letters, digits, . - and _, the first a letter, digit or _, as in "
            f"NAME={shlex.quote(path)}"
        )
    return name, path


def as_run(config: AttackRunConfig, path: str) -> RunConfig:
    """The run whose plan is that of one checkpoint's attacks."""
    controls = ControlsConfig(filter=False, random=False)
    common = {"name": config.name, "output": config.output, "seed": config.seed, "workers": config.workers}
    attacks = {"relearn": config.relearn, "attacks": config.envelope(), "parallel": config.parallel}
    return RunConfig(**common, **attacks, model=ModelConfig(path=path), data=config.data, controls=controls)


def remove_weights(folder: Path) -> None:
    """Removes the weights of a finished stage; its manifest keeps their hashes and names them as removed."""
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        facts = read_object(folder / MANIFEST, {"removed?": [str]})
        write_json(
            folder / MANIFEST, {**facts, "removed": sorted({*facts.get("removed", []), *(path.name for path in weights)})}
        )
        for path in weights:
            path.unlink()


def _finish(store: Store, config: AttackRunConfig, defences: list[Defence], command: str) -> Path:
    """Writes a folder for each checkpoint, the results and the report of all that the output folder has."""
    use_threads(1)
    output, metric, sizes = Path(config.output), _metric(store, config, defences[0]), _bytes(config)
    for defence in defences:
        for attacked in defence.attacks.values() if not config.keep else ():
            for curve in attacked.entry(store)["curves"]:  # a call that was killed may have left some
                remove_weights(store.root / curve["stage"])
        models = [_entry(store, defence, metric, sizes)]
        result = results_file(config.name, config.seed, command, _settings(config, defence), metric, models)
        write_defence(defence_folder(output, defence.name, config.seed), result, config.measures)
    seeds = merged(known_defences(output))
    for results in seeds:
        slowdown = slowdown_entry(results)
        entry = {"slowdown": slowdown} if slowdown else {}
        write_json(output / f"results-seed{results['seed']}.json", {**results, **entry})
    write_heatmap(output / "report", next(results for results in seeds if results["seed"] == config.seed))
    report = write_report(seeds, output / "report", config.name)
    console.print(terminal_table(seeds))
    console.print(str(report))
    return report


def _settings(config: AttackRunConfig, defence: Defence) -> dict[str, Any]:
    """The settings that must agree between checkpoints in one table, with a digest of the text, as files of one name can differ."""
    attacks = {name: dataclasses.asdict(own) for name, own in config.envelope().items()}
    data = {**dataclasses.asdict(config.data), "text": _digest(defence, text=True)}
    return {
        "data": data,
        "relearn": dataclasses.asdict(config.relearn),
        "attacks": attacks,
        **margin_entry(config.retain_margin),
    }


def _digest(defence: Defence, text: bool) -> str:
    """Digest of the text that a checkpoint is attacked with, or of the checkpoint's own files."""
    read = {str(Path(source)) for _, source in defence.prepared.data.sources()}
    files = defence.prepared.files.items()
    return hash_json(sorted([Path(path).name, digest] for path, digest in files if (path in read) == text))


def _check_alike(config: AttackRunConfig, defences: list[Defence]) -> None:
    """Raises a ValueError unless the output folder is new, or holds other checkpoints that were attacked with the same settings."""
    output, own = Path(config.output), settings_of({"config": _settings(config, defences[0]), "metric": {}})
    for path in output.glob("results-seed*.json"):
        models = read_object(path, models=[{"kind": str}])["models"]
        if all(entry["kind"] != DEFENCE for entry in models):
            raise ValueError(f"output: got {output}, which has the results of a run, {path.name}; wanted another folder")
    for known in known_defences(output):
        (entry,) = known["models"]
        other = settings_of({"config": known["config"], "metric": {}})
        differing = sorted(key for key in {**own, **other} if own.get(key) != other.get(key))
        if differing:
            key = min(differing, key=lambda key: (key.startswith("attacks."), key))  # they follow relearn unless they are given
            raise ValueError(
                f"{key}: got {own.get(key)}, but {entry['name']} in {output} was attacked with {other.get(key)}; "
                "wanted the same settings, or another output folder"
            )
        given = next((defence.name for defence in defences if defence.reference), entry["name"])
        if entry.get("reference") and given != entry["name"]:
            raise ValueError(f"reference: got {given}, but {output} has {entry['name']} as the reference; wanted the same")
        for defence in (defence for defence in defences if defence.name == entry["name"]):
            path, there = defence.prepared.model.path, entry["checkpoint"]
            if (defence.kind, _digest(defence, text=False)) != (entry["kind"], there["content"]):
                raise ValueError(
                    f"checkpoints: got {defence.name}={path} as {defence.kind}, but {output} has {defence.name} as "
                    f"{entry['kind']}, made from {there['path']} as it then was; wanted NAME={path} with another name"
                )


def _units(store: Store, config: AttackRunConfig, defences: list[Defence]) -> Callable[[str], Unit]:
    """The unit of the table for each stage that attacks, by its title, once the checkpoint's text is prepared."""
    owners = {attacked.title: defence for defence in defences for attacked in defence.attacks.values()}

    @functools.cache
    def unit(name: str) -> Unit:
        defence = next(defence for defence in defences if defence.name == name)
        if not (sizes := _bytes(config)):
            return Unit(_unit(config), {"forget": 100.0, "retain": 100.0})
        return Unit(_unit(config), _tokens_per_byte(defence, store.manifest(defence.prepared), sizes))

    def unit_of(title: str) -> Unit:
        owner = next((owner for start, owner in owners.items() if f"{title} ".startswith(f"{start} ")), None)
        return Unit() if owner is None else unit(owner.name)

    return unit_of


def _unit(config: AttackRunConfig) -> str:
    return "nats/byte" if config.data.metric == "loss" else "%"


def _metric(store: Store, config: AttackRunConfig, defence: Defence) -> dict[str, Any]:
    splits = store.manifest(defence.prepared)["splits"]
    return {
        "kind": config.data.metric,
        "unit": _unit(config),
        "headline_step": config.relearn.headline_step,
        "retain_target": None,
        "eval_splits": {name: facts["rows"] for name, facts in splits.items() if not name.startswith("train")},
        **margin_entry(config.retain_margin),
    }


def _bytes(config: AttackRunConfig) -> dict[str, int]:
    """Bytes of the test text of forget and retain; empty if questions are asked, whose accuracy needs no such unit."""
    if config.data.metric == "accuracy":
        return {}
    seed = config.data.seed if config.data.seed is not None else derive_seed(config.seed, "data")
    sources = {"forget": config.data.forget, "retain": config.data.retain}
    return {name: split_bytes(own, config.data.valid_fraction, seed)["test"] for name, own in sources.items()}


def _entry(store: Store, defence: Defence, metric: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    facts = store.manifest(defence.prepared)
    tokens = _tokens_per_byte(defence, facts, sizes)
    entry: dict[str, Any] = {
        "name": defence.name,
        "kind": defence.kind,
        "alpha": None,
        "stage": defence.prepared.name,
        "metrics": evaluation(store, defence.prepared, defence.prepared),
        "training": None,
        "attack": None,
        **({"reference": True} if defence.reference else {}),
        "checkpoint": {
            "path": defence.prepared.model.path,
            "content": _digest(defence, text=False),
            "outputs": facts["outputs"],
            "parameters": facts["parameters"],
            "tokens_per_byte": tokens or None,
        },
    }
    if defence.attacks:
        further = {name: attacked for name, attacked in defence.attacks.items() if name != HEADLINE}
        entry["attack"] = defence.attacks[HEADLINE].entry(store)
        entry["attacks"] = {name: attacked.named_entry(store) for name, attacked in further.items()}
    entry = per_byte(entry, tokens) if tokens else entry
    return {**entry, "worst": worst_of(entry, metric)} if defence.attacks else entry


def _tokens_per_byte(defence: Defence, facts: dict[str, Any], sizes: dict[str, int]) -> dict[str, float]:
    return {name: _tokens(defence, facts["splits"][f"test_{name}"]) / size for name, size in sizes.items()}


def _tokens(defence: Defence, split: dict[str, Any]) -> int:
    """Number of tokens of the text: without a beginning-of-text token that every sequence has because the setting asks for it."""
    return split["tokens"] - (split["rows"] if defence.prepared.data.beginning == "sequences" else 0)


def per_byte(entry: dict[str, Any], tokens: dict[str, float]) -> dict[str, Any]:
    """The entry with losses in nats per byte; ``tokens`` is the number of tokens that the tokenizer makes of a byte, by split."""

    def scaled(name: str, score: dict[str, Any]) -> dict[str, Any]:
        return {**score, **{key: score[key] * tokens[name] for key in INTERVAL}}

    def curves(attack: dict[str, Any]) -> dict[str, Any]:
        parts = {
            key: [
                {**curve, **{name: [scaled(name, score) for score in curve[name]] for name in tokens}} for curve in attack[key]
            ]
            for key in ("curves", "trials")  # a search has trials beside its outcome
            if key in attack
        }
        return {**attack, **parts}

    result = {**entry, "metrics": {name: scaled(name, score) for name, score in entry["metrics"].items()}}
    if entry["attack"]:
        result["attack"] = curves(entry["attack"])
        result["attacks"] = {name: curves(attack) for name, attack in entry["attacks"].items()}
    return result
