"""Settings of a run: dataclasses that the command line fills from YAML files and flags."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import NoiseRule, Policy, outside

from undo_core.attacks.config import HEADLINE, AttackConfig
from undo_core.attacks.interventions import AnyIntervention
from undo_core.attacks.search import SearchConfig
from undo_core.data.questions import MultipleChoiceConfig
from undo_core.distillation.gate import GateConfig
from undo_core.distillation.on_policy import OnPolicyConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.distributed.config import ParallelConfig
from undo_core.evaluation.inside import AnyMeasurement
from undo_core.noise.damage import DamageConfig
from undo_core.noise.parameters import PARTS, Parts
from undo_core.pipeline.student_config import StudentConfig
from undo_core.training.config import TrainConfig
from undo_core.unlearning.config import UnlearnConfig

Sources = list[str] | dict[str, float]
AnyAttack = AttackConfig | SearchConfig | AnyIntervention


@dataclass(frozen=True)
class DistillDataConfig:
    """Text to distill on, if it is not the training text of retain and forget.

    Attributes:
        sources: files or hf://..., as in data.retain; empty uses the training sequences of retain and forget.
        tokens: maximum number of tokens, or, if the sources have shares, the total that they share; None takes everything.
        length: tokens in a packed sequence; None for data.length.
    """

    sources: Sources = field(default_factory=list)
    tokens: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        _check_sources("data.distill.sources", self.sources, "data.distill.tokens", self.tokens)
        if self.length is not None and self.length < 2:
            raise ValueError(f"data.distill.length: got {self.length}, wanted an integer >= 2")


@dataclass(frozen=True)
class QuestionsConfig:
    """Multiple-choice questions, such as WMDP and MMLU, that score a run on text instead of the cross-entropy of held-out text.

    Give both forget and retain, or neither. With questions, the validation and test rows are questions, and performance on
    retain and forget is the share answered correctly; stop rules treat it as an accuracy. The training data stay the same.

    Attributes:
        forget: questions whose answers are to be forgotten.
        retain: questions whose answers are to be kept.
        valid_fraction: share of the questions used for validation (stop rules and training curves), chosen by a hash of the
            seed and the question; the results use the others.
    """

    forget: MultipleChoiceConfig | None = None
    retain: MultipleChoiceConfig | None = None
    valid_fraction: float = 0.2

    def __post_init__(self) -> None:
        for name, other in (("forget", "retain"), ("retain", "forget")):
            if getattr(self, name) is None and getattr(self, other) is not None:
                raise ValueError(f"data.questions.{name}: got none beside those of {other}, wanted both or neither")
        if not 0 < self.valid_fraction < 1:
            raise ValueError(f"data.questions.valid_fraction: got {self.valid_fraction}, wanted a number in (0, 1)")

    def __bool__(self) -> bool:
        """Whether there are any questions."""
        return self.forget is not None

    def chosen(self) -> dict[str, MultipleChoiceConfig]:
        """The questions of retain and forget by name; empty if there are none."""
        return {"retain": self.retain, "forget": self.forget} if self else {}


@dataclass(frozen=True)
class DataConfig:
    """The data: what is retained and what is forgotten.

    Attributes:
        kind: arithmetic-compact (17 characters, one problem in each sequence), arithmetic (the published generator) or text
            (files).
        seed: seed of the draws and of the choice of held-out problems; None derives it from the run's seed.
        train_rows: number of problems drawn for each of retain and forget (arithmetic).
        eval_prompts: number of prompts of each group in each evaluation split (arithmetic).
        held_out: share of operand pairs that no stage ever sees (arithmetic-compact).
        length: tokens in a packed sequence (arithmetic, text).
        documents: shared: a token attends to everything before it in its packed sequence, other documents included, as
            published; isolated: a token attends only to its own document, whose positions start at 0 (arithmetic, text).
        beginning: where the tokenizer's beginning-of-text token stands: before each document, or before each packed sequence
            too, those that continue a document included. Choose sequences for a checkpoint that was pretrained so: without
            the token, Gemma predicts the same text much worse (text).
        retain: text to retain: files (.txt, .jsonl, .parquet) or hf://name[:config[:split]][#field]. A mapping gives each
            source its share of ``tokens``; a source with fewer tokens than that is repeated (text).
        forget: text to forget, in the same form (text).
        tokens: number of tokens taken from each of retain and forget, all three splits together; None takes everything (text).
        distill: other text to distill on (text).
        questions: multiple-choice questions that score the models instead of held-out text (text).
        valid_fraction: share of the documents that goes to the validation split, and to the test split (text).
        special_tokens: how to read a control token, such as ``<|endoftext|>``, that is written out in a document. text: as
            ordinary characters; parse: as that token, for files that were made for it (text).
        tokenizer: folder of a tokenizer; None builds one, of characters for arithmetic and a byte-level BPE for text.
        vocab_size: size of the BPE tokenizer (text).
    """

    kind: Literal["arithmetic-compact", "arithmetic", "text"] = "arithmetic-compact"
    seed: int | None = None
    train_rows: int = 100_000
    eval_prompts: int = 1000
    held_out: float = 0.1
    length: int = 256
    documents: Literal["shared", "isolated"] = "shared"
    beginning: Literal["documents", "sequences"] = "documents"
    retain: Sources = field(default_factory=list)
    forget: Sources = field(default_factory=list)
    tokens: int | None = None
    distill: DistillDataConfig = field(default_factory=DistillDataConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    valid_fraction: float = 0.05
    special_tokens: Literal["text", "parse"] = "text"
    tokenizer: str | None = None
    vocab_size: int = 8000

    def __post_init__(self) -> None:
        if self.kind not in ("arithmetic-compact", "arithmetic", "text"):
            raise ValueError(f"data.kind: got {self.kind!r}, wanted arithmetic-compact, arithmetic or text")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out: got {self.held_out}, wanted a number in [0, 1)")
        if not 0 < self.valid_fraction < 0.5:
            raise ValueError(f"data.valid_fraction: got {self.valid_fraction}, wanted a number in (0, 0.5)")
        for name in ("train_rows", "eval_prompts", "length", "vocab_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"data.{name}: got {getattr(self, name)}, wanted an integer >= 2")
        if self.kind == "text" and not (self.retain and self.forget):
            missing = "retain" if not self.retain else "forget"
            raise ValueError(f"data.{missing}: got no files, wanted at least one; pass --data.{missing}='[path]'")
        if self.documents not in ("shared", "isolated"):
            raise ValueError(f"data.documents: got {self.documents!r}, wanted shared or isolated")
        if self.documents == "isolated" and self.kind == "arithmetic-compact":
            raise ValueError(
                "data.documents: got isolated with kind arithmetic-compact, whose sequences hold one problem; wanted shared"
            )
        if self.beginning not in ("documents", "sequences"):
            raise ValueError(f"data.beginning: got {self.beginning!r}, wanted documents or sequences")
        if self.beginning == "sequences" and self.kind != "text":
            raise ValueError(
                f"data.beginning: got sequences with kind {self.kind}, wanted documents: sequences needs kind text"
            )
        if self.special_tokens not in ("text", "parse"):
            raise ValueError(f"data.special_tokens: got {self.special_tokens!r}, wanted text or parse")
        for name in ("retain", "forget"):
            _check_sources(f"data.{name}", getattr(self, name), "data.tokens", self.tokens)
        if self.distill.sources and self.kind != "text":
            raise ValueError(f"data.distill.sources: got some with kind {self.kind}, wanted none: they need kind text")
        if self.questions and self.kind != "text":
            raise ValueError(f"data.questions: got some with kind {self.kind}, wanted none: they need kind text")

    @property
    def metric(self) -> Literal["accuracy", "loss"]:
        """Measure of performance: accuracy of the answers, or, for text without answers, cross-entropy (loss)."""
        return "loss" if self.kind == "text" and not self.questions else "accuracy"

    def sources(self) -> list[tuple[str, str]]:
        """Every file and Hugging Face Hub data set that is read, each with the key that names it."""
        named = {"retain": self.retain, "forget": self.forget, "distill.sources": self.distill.sources}
        for name, asked in self.questions.chosen().items():
            named |= {f"questions.{name}.files": asked.files, f"questions.{name}.examples": asked.examples}
        return [(f"data.{key}", source) for key, sources in named.items() for source in sources]


def _check_sources(name: str, sources: Sources, budget: str, tokens: int | None) -> None:
    if tokens is not None and tokens < 2:
        raise ValueError(f"{budget}: got {tokens}, wanted an integer >= 2")
    if not isinstance(sources, dict):
        return
    for source, share in sources.items():
        if not 0 < share < float("inf"):
            raise ValueError(f"{name}: got the share {share} for {source}, wanted a finite number > 0")
    if sources and tokens is None:
        raise ValueError(f"{budget}: got null with shares in {name}, wanted the total number of tokens")


@dataclass(frozen=True)
class ModelConfig:
    """The model: an architecture to train from scratch, or a checkpoint to start from.

    Attributes:
        config: keyword arguments of the Hugging Face configuration, including ``model_type``.
        path: folder of a pretrained checkpoint; the run then skips pretraining.
        seed: seed of the initialisation; None derives it from the run's seed.
    """

    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if bool(self.config) == bool(self.path):
            raise ValueError(
                "model: wanted either model.config (train from scratch) or model.path (a checkpoint folder), and not both"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining of the original model and of the data-filtering control.

    Attributes:
        train: optimizer, learning rates, batch sizes; ``steps`` is the limit.
        stop_retain: stop at the first evaluation with at least this retain accuracy and at least ``stop_forget``; None trains
            for ``steps``.
        stop_forget: forget accuracy that the stop rule requires as well; None requires none.
        tokens: number of tokens on which a checkpoint (model.path) was pretrained elsewhere, used to report the labelled share;
            None if unknown.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    stop_retain: float | None = None
    stop_forget: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"pretrain.tokens: got {self.tokens}, wanted an integer >= 1")


@dataclass(frozen=True)
class NoiseConfig:
    """The damage: ``theta <- (1 - alpha) * theta + alpha * beta * N``.

    Attributes:
        alphas: strengths in [0, 1], one student for each.
        beta: scale of the noise.
        law: distribution of N.
        std: standard deviation of the normal law.
        rules: other settings for some parameters, matched by glob or by class (matrices, vectors, embeddings, layers:0-3,7);
            later rules win.
        layers: noise only these layers, such as 0-3,7; null for all parameters.
        parts: which part of a multimodal model is damaged: text (its decoder, embeddings and head) or all. Applies to
            ``damage`` too.
        seed: seed of N; None derives it from the run's seed.
    """

    alphas: list[float] = field(default_factory=lambda: [0.6])
    beta: float = 0.1
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform"
    std: float | None = None
    rules: list[NoiseRule] = field(default_factory=list)
    layers: str | None = None
    parts: Parts = "text"
    seed: int | None = None

    def all_rules(self) -> list[NoiseRule]:
        """``rules``, with ``layers`` added as a last rule."""
        return list(self.rules) if self.layers is None else [*self.rules, outside(self.layers)]

    def __post_init__(self) -> None:
        for alpha in self.alphas:
            if not 0 <= alpha <= 1:
                raise ValueError(f"noise.alphas: got {alpha}, wanted numbers in [0, 1]")
        if len(set(self.alphas)) < len(self.alphas) or not self.alphas:
            raise ValueError(f"noise.alphas: got {self.alphas}, wanted one or more different numbers in [0, 1]")
        for alpha in self.alphas:
            Policy(alpha, self.beta, self.law, self.std, tuple(self.all_rules()))
        checks.choice("noise.parts", self.parts, PARTS)


@dataclass(frozen=True)
class DistillConfig:
    """Distillation of the suppressed model into a damaged copy or a random student.

    Attributes:
        train: optimizer, learning rates, batch sizes; ``steps`` is the limit.
        recover: the student (and the data-filtering control) stops at the first evaluation within this distance of the
            teacher's retain performance (the published rule): an absolute difference of accuracy (arithmetic, questions) or a
            relative one of cross-entropy. None trains for ``steps``.
        teacher: where the teacher's outputs come from. A cache is made once for all students of the run and of its sweeps.
        hidden_weight: factor on the relative squared error of the student's hidden states, added to the KL of the logits; needs
            a resident or streamed teacher. 0, as published, leaves it out.
        hidden_layers: layers after which hidden states are compared: 0 is the embeddings, the last layer is taken after the
            final norm; null for every layer.
        vocab_size: number of real tokens, for a head that is padded to more vocabulary entries; the KL leaves the padding out.
            null for all entries.
        on_policy: steps that train on continuations which the student draws, by the reverse KL; none by default, as published.
            Needs a resident or streamed teacher.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    recover: float | None = 0.05
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    hidden_weight: float = 0.0
    hidden_layers: list[int] | None = None
    vocab_size: int | None = None
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)

    def __post_init__(self) -> None:
        self.on_policy.check(self.teacher.kind)
        if not (math.isfinite(self.hidden_weight) and self.hidden_weight >= 0):
            raise ValueError(f"distill.hidden_weight: got {self.hidden_weight}, wanted a finite number >= 0")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"distill.vocab_size: got {self.vocab_size}, wanted an integer >= 1, or null")
        if self.teacher.vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"distill.teacher.vocab_size: got {self.teacher.vocab_size}, wanted null: distill.vocab_size, "
                f"{self.vocab_size}, holds for the cache too"
            )
        if self.hidden_weight and self.teacher.kind in ("cached", "topk"):
            raise ValueError(
                f"distill.hidden_weight: got {self.hidden_weight} with distill.teacher.kind {self.teacher.kind}, which stores "
                "no hidden states of the layers; wanted a resident or streamed teacher"
            )


@dataclass(frozen=True)
class ControlsConfig:
    """The models to compare with; the original and the one that is only unlearned are always included.

    Attributes:
        filter: data filtering: a model trained from scratch without the forget set.
        random: the teacher distilled into a fresh initialisation from another seed.
        oracle_steps: steps of distilling the data-filtered model into the original one (the paper's oracle matching); 0 leaves
            it out.
        oracle_random_steps: steps of distilling the data-filtered model into random weights; 0 leaves it out.
        gate: filter-then-distill: no unlearning, but distillation on data from which a cheap classifier has dropped sequences.
    """

    filter: bool = True
    random: bool = True
    oracle_steps: int = 0
    oracle_random_steps: int = 0
    gate: GateConfig = field(default_factory=GateConfig)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
        name: name of the run and of its report.
        output: folder of the stages, results and report.
        model: the model that is trained.
        seed: seed from which all other seeds derive, unless a stage sets its own.
        workers: number of stages that run in parallel, each with its share of the CPU threads. Continue a run with the number
            that it was started with: the order of a sum, and so its last bit, can depend on the number of threads.
        parallel: how the ranks of torchrun work together.
        data: what is retained and what is forgotten.
        pretrain: pretraining of the original and of the data-filtering control.
        unlearn: how the capability is suppressed.
        noise: how the students are damaged.
        distill: how the students are repaired.
        relearn: how the models are attacked.
        controls: the models to compare with.
        damage: students damaged as much as by the noise, by other means.
        students: further students by name, such as those whose vocabulary matrices have noise of their own.
        attacks: further attacks, by name; also interventions, whose ``kind`` is the name of a file in
            undo_core/attacks/interventions, and a search over the settings of attacks, whose ``kind`` is search.
        retain_margin: margin of a second worst case beside the headline's, over the trials that leave the model useful: those
            whose retain performance is at most this much worse than before the attack. An absolute difference of accuracy or
            a relative one of cross-entropy; null for none.
        measures: measures of what the models still hold inside, by name; the ``kind`` of each is the name of a file in
            undo_core/evaluation/inside.
        target_robustness: R for which the cheapest alpha is searched, beginning with noise.alphas; null searches none. R is
            measured against data filtering, or without it against the random student.
        alpha_resolution: distance of neighbouring alphas at which the search ends; it tries multiples of it.
        alpha_tries: largest number of alphas that the search adds to noise.alphas.
        alpha_max: alpha that the search tries if none of noise.alphas reaches the target.
    """

    name: str
    output: str
    model: ModelConfig
    seed: int = 0
    workers: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    relearn: AttackConfig = field(default_factory=AttackConfig)
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    damage: DamageConfig = field(default_factory=DamageConfig)
    students: dict[str, StudentConfig] = field(default_factory=dict)
    attacks: dict[str, AnyAttack] = field(default_factory=dict)
    retain_margin: float | None = None
    measures: dict[str, AnyMeasurement] = field(default_factory=dict)
    target_robustness: float | None = None
    alpha_resolution: float = 0.02
    alpha_tries: int = 8
    alpha_max: float = 0.9

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers: got {self.workers}, wanted an integer >= 1")
        if self.model.path and self.controls.filter:
            raise ValueError(
                "controls.filter: got true, wanted false with model.path: data filtering means pretraining from scratch"
            )
        for name in ("oracle_steps", "oracle_random_steps"):
            if getattr(self.controls, name) and not self.controls.filter:
                raise ValueError(
                    f"controls.{name}: wanted 0 without controls.filter, because the data-filtered model is the oracle"
                )
        if self.data.metric == "loss" and self.pretrain.stop_retain is not None:
            raise ValueError(
                f"pretrain.stop_retain: got {self.pretrain.stop_retain} with text that is scored by its cross-entropy, wanted "
                "null: it is an accuracy, for arithmetic or data.questions"
            )
        check_attacks(self.relearn, self.attacks)
        check_margin(self.retain_margin)
        for section, names in (("measures", self.measures), ("students", self.students)):
            for name in names:
                if not re.fullmatch(r"[\w-]+", name):
                    raise ValueError(f"{section}: got the name {name!r}, wanted letters, digits, - and _")
        for name, student in self.students.items():
            if student.model in ("random", "filter") and not getattr(self.controls, student.model):
                raise ValueError(
                    f"students.{name}.model: got {student.model}, wanted controls.{student.model} true, or another model"
                )
        self._check_search()

    def _check_search(self) -> None:
        target = self.target_robustness
        if target is not None and not 0 < target < math.inf:
            raise ValueError(f"target_robustness: got {target}, wanted a finite number > 0, or null")
        if target is not None and not (self.controls.filter or self.controls.random):
            raise ValueError(
                f"target_robustness: got {target} without a control that R is measured against; wanted controls.filter or "
                "controls.random"
            )
        if not 0.001 <= self.alpha_resolution <= 0.5:
            raise ValueError(f"alpha_resolution: got {self.alpha_resolution}, wanted a number in [0.001, 0.5]")
        if self.alpha_tries < 1:
            raise ValueError(f"alpha_tries: got {self.alpha_tries}, wanted an integer >= 1")
        if not 0 < self.alpha_max <= 1:
            raise ValueError(f"alpha_max: got {self.alpha_max}, wanted a number in (0, 1]")


def check_attacks(relearn: AttackConfig, attacks: dict[str, AnyAttack]) -> None:
    """Raises a ValueError if the headline attack trains nothing, or a further attack has an unusable name or is an impossible search."""
    if not relearn.trains:
        raise ValueError(f"relearn.kind: got {relearn.kind}, wanted finetune or lora; put other kinds under attacks")
    for name in attacks:
        if name == HEADLINE or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(
                f"attacks: got the name {name!r}, wanted letters, digits, - and _, and not relearn, the headline attack"
            )
    for name, own in attacks.items():
        if isinstance(own, SearchConfig):
            try:
                own.along(relearn)
            except ValueError as error:
                raise ValueError(f"attacks.{name}.{error}") from None


def check_margin(margin: float | None) -> None:
    """Raises a ValueError unless the margin is a finite number of at least 0, or None."""
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"retain_margin: got {margin}, wanted a finite number >= 0, or null")


def derive_seed(seed: int, name: str) -> int:
    """Derives a stage's seed from the run's seed: 31 bits of a hash, so that stages and runs draw independently."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little") >> 1


def seeded(settings: Any, seed: int, name: str) -> Any:
    """Returns the settings with a seed: their own, or one derived from the run's seed and the stage's name."""
    return settings if settings.seed is not None else dataclasses.replace(settings, seed=derive_seed(seed, name))
