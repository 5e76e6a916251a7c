"""The graph of a run: its models and the stages that make them, from the configuration alone; nothing is computed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from undo_core.attacks.config import Trial, with_seed
from undo_core.checkpoint_files import named_weight_files
from undo_core.files import hash_file
from undo_core.models import configuration, positions_of
from undo_core.pipeline.attacked import Attacked
from undo_core.pipeline.config import DataConfig, ModelConfig, RunConfig, derive_seed
from undo_core.pipeline.store import Stage
from undo_core.text_files import check_is_content

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges*", "*.model"),
)
_NONE: Mapping[str, Stage] = MappingProxyType({})


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        name: unique within the run.
        kind: original, unlearn, undo, random, filter, oracle, oracle-random, gated or damaged.
        stage: whose folder holds it.
        alpha: strength of the noise, for undo and gated; for damaged, of the noise that changes as much.
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
        ValueError: examples of a few-shot attack that cannot fit the model's positions.
    """
    seed = config.seed

    def seeded(settings: Any, name: str) -> dict[str, Any]:
        return _seeded(settings, seed, name)

    prepared = prepare_stage(config.data, config.model, seed)
    _check_shots(config)
    if config.model.path:
        original = prepared
    else:
        rule = {"stop_retain": config.pretrain.stop_retain, "stop_forget": config.pretrain.stop_forget}
        settings = {"train": seeded(config.pretrain.train, "pretrain"), "splits": ["retain", "forget"], **rule}
        original = Stage("pretrain", settings, {"prepared": prepared}, "pretrain")

    unlearn = config.unlearn.settings()
    unlearn["train"] = seeded(config.unlearn.train, "unlearn")
    teacher = Stage("unlearn", unlearn, {"prepared": prepared, "model": original}, f"unlearn {config.unlearn.title}")

    train = seeded(config.distill.train, "distill")

    how = _teacher_settings(config)
    cache = cache_stage(how, prepared, teacher)
    if config.distill.vocab_size is not None:
        how["vocab_size"] = config.distill.vocab_size
    if config.distill.hidden_weight:
        how["hidden"] = {"hidden_weight": config.distill.hidden_weight, "hidden_layers": config.distill.hidden_layers}

    def distilled(
        student: Stage, title: str, source: Stage = teacher, others: Mapping[str, Stage] = _NONE, **changes: Any
    ) -> Stage:
        settings = {"train": train, "recover": config.distill.recover, **how, **changes}
        inputs = {"prepared": prepared, "teacher": source, "student": student, **others}
        if cache is not None and source is teacher:
            inputs["cache"] = cache
        return Stage("distill", settings, inputs, title)

    models = [Model("original", "original", original), Model("unlearn", "unlearn", teacher)]
    parts = {} if config.noise.parts == "text" else {"parts": config.noise.parts}
    for alpha in sorted(config.noise.alphas):
        damaged = Stage("noise", {**_noise_settings(config, alpha), **parts}, {"model": teacher}, f"noise {alpha:g}")
        models.append(Model(f"undo-{alpha:g}", "undo", distilled(damaged, f"distill {alpha:g}"), alpha))
    damage = config.damage
    for operator in damage.operators:
        drawn = damage.seed if damage.seed is not None else derive_seed(seed, "damage")
        for alpha in sorted(config.noise.alphas if damage.alphas is None else damage.alphas):
            settings = {"operator": operator, "seed": drawn, "layers": damage.layers, "like": _noise_settings(config, alpha)}
            damaged = Stage("damage", {**settings, **parts}, {"model": teacher}, f"{operator} {alpha:g}")
            name = f"undo-{alpha:g}-{operator}"
            models.append(Model(name, "damaged", distilled(damaged, f"distill {alpha:g} {operator}"), alpha))
    fresh = Stage("initialise", {"seed": derive_seed(seed, "random student")}, {"model": prepared}, "random student")
    if config.controls.random:
        models.append(Model("random", "random", distilled(fresh, "distill random")))
    # A teacher of few students is not worth a cache.
    few = {"teacher": {"kind": "streamed"}} if cache is not None else {}
    gate = config.controls.gate
    if gate.share:
        settings = {name: value for name, value in seeded(gate, "gate").items() if name != "alphas"}
        gated = Stage("gate", settings, {"prepared": prepared}, "gate")
        for alpha in sorted(gate.alphas) or [None]:
            name, student = "gated", fresh
            if alpha is not None:
                name = f"gated-{alpha:g}"
                settings = {**_noise_settings(config, alpha), **parts}
                student = Stage("noise", settings, {"model": original}, f"noise original {alpha:g}")
            # The target is every student's: what the unlearned teacher retains.
            others = {"gate": gated, "target": teacher}
            models.append(Model(name, "gated", distilled(student, f"distill {name}", original, others, **few), alpha))
    if config.controls.filter:
        # C compares steps to one target, so both are counted at one batch size and evaluation interval.
        counted = {"batch_size": config.distill.train.batch_size, "eval_every": config.distill.train.eval_every}
        filter_train = dataclasses.replace(config.pretrain.train, **counted)
        settings = {"train": seeded(filter_train, "filter"), "splits": ["retain"], "recover": config.distill.recover}
        filtered = Stage("pretrain", settings, {"prepared": prepared, "target": teacher}, "data filtering")
        models.append(Model("filter", "filter", filtered))
        oracles = {
            "oracle": (original, config.controls.oracle_steps),
            "oracle-random": (fresh, config.controls.oracle_random_steps),
        }
        for kind, (student, steps) in oracles.items():
            if steps:
                changes = {"train": {**train, "steps": steps}, "recover": None, **few}
                models.append(Model(kind, kind, distilled(student, f"distill {kind}", filtered, **changes)))
    return Plan(prepared, models)


def _noise_settings(config: RunConfig, alpha: float) -> dict[str, Any]:
    """Of the published noise at one strength."""
    noise = config.noise
    seed = noise.seed if noise.seed is not None else derive_seed(config.seed, "noise")
    settings = {"alpha": alpha, "beta": noise.beta, "law": noise.law, "seed": seed}
    if noise.std is not None:
        settings["std"] = noise.std
    if rules := noise.all_rules():
        settings["rules"] = [dataclasses.asdict(rule) for rule in rules]
    return settings


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
        if config.distill.vocab_size is not None:
            chosen["vocab_size"] = config.distill.vocab_size
    return {"teacher": chosen}


def cache_stage(how: dict[str, Any], prepared: Stage, teacher: Stage) -> Stage | None:
    """The stage that runs the teacher once for all its students, where the settings ask for one."""
    settings = how.get("teacher", {})
    if settings.get("kind") not in ("cached", "topk"):
        return None
    return Stage("cache", settings, {"prepared": prepared, "teacher": teacher}, "cache teacher")


def prepare_stage(data: DataConfig, model: ModelConfig, seed: int) -> Stage:
    """The stage that draws the data and initialises the model; the files that it reads are part of its key: text, a checkpoint, a
    tokenizer. What is streamed from the hub (``hf://``) cannot be hashed: its name alone is part of the key, and a data set that
    changes there is not drawn again.

    Raises:
        FileNotFoundError: a data file, the checkpoint folder or the tokenizer's is missing.
        ValueError: a pointer file of Git LFS in the place of one of these.
    """
    settings = {"data": _seeded(data, seed, "data"), "model": _seeded(model, seed, "model")}
    if not data.questions:  # as in the keys of runs from before there were questions
        del settings["data"]["questions"]
    files = [Path(path) for path in data.sources() if "://" not in path]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"data: got {path}, which is not a file; check data.retain, data.forget, data.distill.sources and data.questions"
            )
    if model.path:
        settings["data"]["tokenizer"] = data.tokenizer or model.path
        checkpoint = Path(model.path)
        if not (checkpoint / "config.json").is_file():
            raise FileNotFoundError(
                f"model.path: got {checkpoint}, which has no config.json; wanted a Hugging Face checkpoint folder"
            )
        files += [checkpoint / "config.json", *(path for path in named_weight_files(checkpoint) if path.is_file())]
    if data.tokenizer and not Path(data.tokenizer).is_dir():
        raise FileNotFoundError(
            f"data.tokenizer: got {data.tokenizer}, which is not a folder; wanted one with a tokenizer's files"
        )
    if tokenizer := settings["data"]["tokenizer"]:
        files += sorted({path for pattern in TOKENIZER_FILES for path in Path(tokenizer).glob(pattern) if path.is_file()})
    for path in files:
        check_is_content(path)
    return Stage("prepare", {**settings, "files": {str(path): hash_file(path) for path in files}}, title="prepare")


def _seeded(settings: Any, seed: int, name: str) -> dict[str, Any]:
    """Settings as JSON values, with the stage's seed derived from the run's where it names none."""
    values = dataclasses.asdict(settings)
    if values["seed"] is None:
        values["seed"] = derive_seed(seed, name)
    return values


def _check_shots(config: RunConfig) -> None:
    """Refuse numbers of examples whose rows are too long for the model at their shortest; the probe itself knows the rows drawn."""
    attacks = {name: attack for name, attack in config.attacks.items() if attack.kind == "fewshot"}
    if not attacks or config.data.questions:
        return
    model = config.model
    positions = positions_of(configuration(vars(model)))
    # An example less its separator, which it shares with the next: a packed row, 1*1=1, 1 * 1 = 1, or a token of another tokenizer.
    own = config.data.tokenizer or model.path
    part = {"text": config.data.length - 1, "arithmetic-compact": 6, "arithmetic": 2 if own else 10}[config.data.kind]
    for name, attack in attacks.items():
        shots = max(attack.shots)
        if positions is not None and (shots + 1) * part > positions:
            raise ValueError(
                f"attacks.{name}.shots: got {shots}, whose rows take at least {(shots + 1) * part} positions of the model's {positions}; "
                f"wanted {max(positions // part - 1, 0)} at most"
            )


def attacked_models(config: RunConfig, plan: Plan) -> dict[str, dict[str, Attacked]]:
    """Each attacked model under each attack, by the attack's name and the model's; the headline attack is ``relearn``."""
    higher, seed = config.data.metric == "accuracy", derive_seed(config.seed, "relearn")
    return {
        attack: {
            model.name: Attacked(with_seed(settings, seed), plan.prepared, model.stage, f"{attack} {model.name}", higher)
            for model in plan.models
            if model.attacked
        }
        for attack, settings in {"relearn": config.relearn, **config.attacks}.items()
    }


def attack_stage(config: RunConfig, plan: Plan, model: Model, rate: float) -> Stage:
    """The headline attack on one model at one learning rate."""
    return attacked_models(config, plan)["relearn"][model.name].stage(Trial(rate=rate))
