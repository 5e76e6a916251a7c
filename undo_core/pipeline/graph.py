"""The graph of a run: its models and the stages that make them, built from the configuration without computing anything."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.attacks.config import with_seed
from undo_core.attacks.search import settled_attacks
from undo_core.distillation.teacher import TeacherConfig
from undo_core.models import configuration, positions_of
from undo_core.pipeline.attacked_model import Attacked
from undo_core.pipeline.config import RunConfig, derive_seed, seeded
from undo_core.pipeline.described import check_stages
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.stages import (
    Cache,
    Damage,
    Distill,
    Erase,
    Gate,
    Initialise,
    Measure,
    Noise,
    Prepare,
    Pretrain,
    Unlearn,
    Untie,
)
from undo_core.pipeline.stages.prepare import prepare_stage
from undo_core.pipeline.student_config import StudentConfig


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        name: unique within the run.
        kind: original, unlearn, undo, random, filter, oracle, oracle-random, gated or damaged.
        stage: stage whose folder holds the model.
        alpha: strength of the noise, for undo and gated; for damaged, strength of the noise that changes the weights as much,
            or of the noise on the parameters without a rule.
        trained: stage that trained the model, if ``stage`` changed it afterwards; None for ``stage``.
    """

    name: str
    kind: str
    stage: Stage
    alpha: float | None = None
    trained: Stage | None = None

    @property
    def training(self) -> Stage:
        """The stage that trained the model."""
        return self.trained or self.stage

    @property
    def attacked(self) -> bool:
        """Whether the model is attacked: all but the original, which still has the capability."""
        return self.kind != "original"


@dataclass(frozen=True)
class Graph:
    """The models of a run, the prepared data that they share, and the unlearned model that teaches most of them."""

    prepared: Prepare
    teacher: Unlearn
    models: list[Model]

    def stages(self) -> list[Stage]:
        """Every stage except the attacks, each once, inputs before the stages that read them."""
        found: dict[str, Stage] = {}

        def visit(stage: Stage) -> None:
            for source in stage.inputs.values():
                visit(source)
            found.setdefault(stage.key, stage)

        for model in self.models:
            visit(model.stage)
        return list(found.values())


def graph_of(config: RunConfig) -> Graph:
    """Builds the models and stages of a run from its configuration; nothing is computed.

    Raises:
        FileNotFoundError: a data file or a checkpoint folder that the configuration names is missing.
        ValueError: the examples of a few-shot attack cannot fit in the model's positions, or a stage would refuse the model.
    """
    prepared = prepare_stage(config.data, config.model, config.seed)
    _check_shots(config)
    graph = _graph(config, prepared)
    check_stages(config, graph.stages())
    return graph


def with_alphas(graph: Graph, config: RunConfig, alphas: list[float]) -> Graph:
    """Returns the graph of the run with these alphas instead of ``noise.alphas``; other damage keeps its own."""
    damage = config.damage
    if damage.alphas is None:
        damage = dataclasses.replace(damage, alphas=config.noise.alphas)
    wider = dataclasses.replace(config, noise=dataclasses.replace(config.noise, alphas=alphas), damage=damage)
    return _graph(wider, graph.prepared)


def _graph(config: RunConfig, prepared: Prepare) -> Graph:
    """Returns the graph of the run on these data: its own models, then the further students."""
    run = _Run(config, prepared)
    models = list(run.models())
    models += run.students({model.kind: model for model in models})
    for name, times in collections.Counter(model.name for model in models).items():
        if times > 1:
            raise ValueError(f"students: got the name {name}, which another model of the run has, wanted another name")
    return Graph(prepared, run.teacher, models)


class _Run:
    """Builds the stages of one configuration."""

    def __init__(self, config: RunConfig, prepared: Prepare) -> None:
        self.config, self.prepared = config, prepared
        pretrain, unlearn = config.pretrain, config.unlearn
        self.original: Stage = prepared
        if not config.model.path:
            self.original = Pretrain(
                train=self.seeded(pretrain.train, "pretrain"),
                splits=("retain", "forget"),
                stop_retain=pretrain.stop_retain,
                stop_forget=pretrain.stop_forget,
                prepared=prepared,
                title="pretrain",
            )
        self.teacher = Unlearn(
            config=dataclasses.replace(unlearn, train=self.seeded(unlearn.train, "unlearn")),
            prepared=prepared,
            model=self.original,
            title=f"unlearn {unlearn.title}",
        )
        self.teacher_config = self._teacher_config()
        self.cache: Cache | None = None
        if self.teacher_config.stored:
            self.cache = Cache(config=self.teacher_config, prepared=prepared, teacher=self.teacher, title="cache teacher")
        seed = derive_seed(config.seed, "random student")
        self.fresh = Initialise(seed=seed, model=prepared, title="random student")

    def models(self) -> Iterator[Model]:
        """The models of the comparison."""
        yield Model("original", "original", self.original)
        yield Model("unlearn", "unlearn", self.teacher)
        yield from self._undo()
        yield from self._damaged()
        if self.config.controls.random:
            yield Model("random", "random", self._distilled(self.fresh, "distill random"))
        yield from self._gated()
        yield from self._filtered()

    def _undo(self) -> Iterator[Model]:
        for alpha in sorted(self.config.noise.alphas):
            student = self._noise(alpha, self.teacher, f"noise {alpha:g}")
            yield Model(f"undo-{alpha:g}", "undo", self._distilled(student, f"distill {alpha:g}"), alpha)

    def _damaged(self) -> Iterator[Model]:
        damage, noise = self.config.damage, self.config.noise
        seed = damage.seed if damage.seed is not None else derive_seed(self.config.seed, "damage")
        for operator in damage.operators:
            for alpha in sorted(noise.alphas if damage.alphas is None else damage.alphas):
                like = dataclasses.replace(self._noise(alpha, self.teacher, ""), parts="text").settings
                student = Damage(
                    operator=operator,
                    seed=seed,
                    layers=damage.layers,
                    like=like,
                    parts=noise.parts,
                    model=self.teacher,
                    title=f"{operator} {alpha:g}",
                )
                distilled = self._distilled(student, f"distill {alpha:g} {operator}")
                yield Model(f"undo-{alpha:g}-{operator}", "damaged", distilled, alpha)

    def students(self, controls: Mapping[str, Model]) -> Iterator[Model]:
        """The further students, in the order of :class:`StudentConfig`'s steps; ``controls`` are the other models by kind."""
        for name, student in self.config.students.items():
            trained = self._student(name, student) if student.model == "undo" else controls[student.model].stage
            stage = trained
            if student.untie and student.model != "undo":
                stage = Untie(model=stage, title=f"untie {name}")
            if student.after:
                stage = self._noise(0.0, stage, f"redraw {name}", [*student.after], "after")
            alone = student.model != "undo"  # nothing was trained for it
            yield Model(name, "damaged", stage, student.alpha, None if alone else trained)

    def _student(self, name: str, config: StudentConfig) -> Distill:
        """Returns the stage that distills the unlearned model into a student that is damaged as ``config`` says."""
        assert config.alpha is not None  # StudentConfig checks it
        base: Stage = self.teacher
        if config.untie:
            base = Untie(model=base, title=f"untie {name}")
        teacher, gaussian = None, config.gaussian
        if gaussian.strength:
            base = Damage(
                operator="gaussian",
                seed=derive_seed(self.config.seed, "gaussian"),
                layers=None,
                parts=self.config.noise.parts,
                strength=gaussian.strength,
                match=gaussian.match,
                model=base,
                title=f"gaussian {name}",
            )
            teacher = base if gaussian.shared else None
        noised = self._noise(config.alpha, base, f"noise {name}", config.rules)
        if config.equal_distance:
            usual = dataclasses.replace(self._noise(config.alpha, base, ""), parts="text")
            noised = dataclasses.replace(noised, like=usual.settings)
        damaged: Stage = noised
        if config.erase.tokens:
            seed = derive_seed(self.config.seed, "erase")
            damaged = Erase(config=config.erase, seed=seed, prepared=self.prepared, model=damaged, title=f"erase {name}")
        return self._distilled(damaged, f"distill {name}", teacher)

    def _gated(self) -> Iterator[Model]:
        gate = self.config.controls.gate
        if not gate.share:
            return
        gated = Gate(config=self.seeded(gate, "gate"), prepared=self.prepared, title="gate")
        for alpha in sorted(gate.alphas) or [None]:
            name, student = "gated", self.fresh
            if alpha is not None:
                name, student = f"gated-{alpha:g}", self._noise(alpha, self.original, f"noise original {alpha:g}")
            # All students stop at the same target: the retain performance of the unlearned teacher.
            others = {"gate": gated, "target": self.teacher}
            yield Model(name, "gated", self._distilled(student, f"distill {name}", self.original, **others), alpha)

    def _filtered(self) -> Iterator[Model]:
        controls, distill = self.config.controls, self.config.distill
        if not controls.filter:
            return
        # C is a ratio of steps to the same target, so both trainings need the same batch size and evaluation interval.
        counted = {"batch_size": distill.train.batch_size, "eval_every": distill.train.eval_every}
        filtered = Pretrain(
            train=self.seeded(dataclasses.replace(self.config.pretrain.train, **counted), "filter"),
            splits=("retain",),
            recover=distill.recover,
            prepared=self.prepared,
            target=self.teacher,
            title="data filtering",
        )
        yield Model("filter", "filter", filtered)
        oracles = {
            "oracle": (self.original, controls.oracle_steps),
            "oracle-random": (self.fresh, controls.oracle_random_steps),
        }
        for kind, (student, steps) in oracles.items():
            if steps:
                matched = self._distilled(student, f"distill {kind}", filtered)
                limited = dataclasses.replace(matched, train=dataclasses.replace(matched.train, steps=steps), recover=None)
                yield Model(kind, kind, limited)

    def seeded(self, settings: Any, name: str) -> Any:
        """Returns the settings with a seed: their own, or one derived from the run's seed and ``name``."""
        return seeded(settings, self.config.seed, name)

    def _noise(self, alpha: float, model: Stage, title: str, rules: Sequence[NoiseRule] = (), seed: str | None = None) -> Noise:
        """Returns the stage of the noise with further rules; with the name of another ``seed``, with these rules alone."""
        noise = seeded(self.config.noise, self.config.seed, "noise")
        rules = [*noise.all_rules(), *rules] if seed is None else rules
        return Noise(
            alpha=alpha,
            beta=noise.beta,
            law=noise.law,
            seed=noise.seed if seed is None else derive_seed(self.config.seed, seed),
            std=noise.std,
            rules=tuple(rules),
            parts=noise.parts,
            model=model,
            title=title,
        )

    def _distilled(self, student: Stage, title: str, teacher: Stage | None = None, **others: Stage) -> Distill:
        """Returns the stage that distills the unlearned model, or ``teacher``, into ``student``.

        Another teacher than the unlearned model has few students and gets no cache; it is streamed instead.
        """
        distill, config = self.config.distill, self.teacher_config
        if teacher is not None and config.stored:
            config = TeacherConfig("streamed")
        return Distill(
            train=self.seeded(distill.train, "distill"),
            recover=distill.recover,
            config=config,
            vocab_size=distill.vocab_size,
            hidden_weight=distill.hidden_weight,
            hidden_layers=distill.hidden_layers,
            on_policy=distill.on_policy,
            prepared=self.prepared,
            teacher=teacher or self.teacher,
            student=student,
            cache=self.cache if teacher is None else None,
            title=title,
            **others,
        )

    def _teacher_config(self) -> TeacherConfig:
        """Returns the teacher's settings; with the distillation's batch size a cache gives the bits of a resident teacher."""
        distill, teacher = self.config.distill, self.config.distill.teacher
        if not teacher.stored:
            return teacher
        size = teacher.batch_size or distill.train.micro_batch_size or distill.train.batch_size
        return dataclasses.replace(teacher, batch_size=size, vocab_size=distill.vocab_size)


def _check_shots(config: RunConfig) -> None:
    """Raises a ValueError if even the shortest few-shot prompts are too long; the probe later checks the actual ones."""
    attacks = {name: attack for name, attack in config.attacks.items() if attack.kind == "fewshot"}
    if not attacks or config.data.questions:
        return
    model = config.model
    positions = positions_of(configuration(vars(model)))
    # Length of the shortest example, without the separator that it shares with the next: a packed sequence; "1*1=1"; "1 * 1 =
    # 1"; or, with a tokenizer whose tokens can be longer, two tokens.
    own = config.data.tokenizer or model.path
    part = {"text": config.data.length - 1, "arithmetic-compact": 6, "arithmetic": 2 if own else 10}[config.data.kind]
    for name, attack in attacks.items():
        shots = max(attack.shots)
        if positions is not None and (shots + 1) * part > positions:
            raise ValueError(
                f"attacks.{name}.shots: got {shots}, whose sequences take at least {(shots + 1) * part} positions of the "
                f"model's {positions}; wanted {max(positions // part - 1, 0)} at most"
            )


def attacked_models(config: RunConfig, graph: Graph) -> dict[str, dict[str, Attacked]]:
    """Returns each attacked model under each attack, by attack name and model name; ``relearn`` is the headline attack."""
    higher, seed = config.data.metric == "accuracy", derive_seed(config.seed, "relearn")
    return {
        attack: {
            model.name: Attacked(
                with_seed(settings, seed), graph.prepared, model.stage, f"{attack} {model.name}", higher, graph.models[0].stage
            )
            for model in graph.models
            if model.attacked
        }
        for attack, settings in settled_attacks(config.relearn, config.attacks).items()
    }


def measured_models(config: RunConfig, graph: Graph) -> dict[str, dict[str, Measure]]:
    """Returns the stage that takes each measure of each model, by the measure's name and the model's name.

    A measure that compares is not taken of the model that it compares with.

    Raises:
        ValueError: a measure compares with a model that the run does not have.
    """
    found: dict[str, dict[str, Measure]] = {}
    for name, measurement in config.measures.items():
        reference = next((model for model in graph.models if model.kind == measurement.against), None)
        if reference is None:
            raise ValueError(f"measures.{name}.against: got {measurement.against}, wanted a model that the run has (controls)")
        found[name] = {
            model.name: Measure(
                measurement=measurement,
                prepared=graph.prepared,
                model=model.stage,
                reference=reference.stage if measurement.compares else None,
                title=f"{name} {model.name}",
            )
            for model in graph.models
            if not (measurement.compares and model.name == reference.name)
        }
    return found
