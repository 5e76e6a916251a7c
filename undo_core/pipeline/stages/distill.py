"""Trains a student to match a teacher, until it recovers the teacher's retain performance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import PreTrainedModel

from undo_core.checkpoints.files import stored_dtype
from undo_core.data.sequences import Sequences
from undo_core.distillation.cache import CachedTeacher
from undo_core.distillation.on_policy import OnPolicyConfig, drawing_bytes
from undo_core.distillation.streaming import stream_model
from undo_core.distillation.student import distill, matching
from undo_core.distillation.teacher import ModelTeacher, Teacher, TeacherConfig
from undo_core.io.progress import console
from undo_core.models import forward_flops, head_flops, head_of, load_model, load_tokenizer, vocabulary_of
from undo_core.pipeline.model_stage import Recovery, TrainingStage, load_to_train, save, training_facts, validation
from undo_core.pipeline.needs import Memory, Scene
from undo_core.pipeline.prepared import distill_sequences, retain_performance
from undo_core.pipeline.stage import Folder, Stage, Work, optional
from undo_core.pipeline.stages.cache import Cache, cached_retain
from undo_core.pipeline.stages.gate import kept_sequences
from undo_core.training import Batch, TrainConfig
from undo_core.training.losses import HiddenTargets, TopTargets, distillation
from undo_core.unlearning import Method

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Distill(TrainingStage):
    """Distills a teacher into a student.

    Attributes:
        train: optimizer, learning rates, batch sizes; ``steps`` is the limit.
        recover: stop within this distance of the retain performance of the teacher, or of ``target``; None trains for all
            steps.
        config: where the teacher's outputs come from.
        vocab_size: number of real tokens, for a head that is padded to more vocabulary entries.
        hidden_weight: factor on the relative squared error of the student's hidden states; 0 leaves it out.
        hidden_layers: layers after which hidden states are compared; None for every layer.
        on_policy: which steps train on what the student draws.
        teacher: the model that the student matches.
        student: the model that is trained.
        gate: gate that selects the training sequences; None keeps all.
        target: model whose retain performance is the target, instead of the teacher.
        cache: the teacher's stored outputs, for a cached or topk teacher.
    """

    kind = "distill"
    time_from = "distill.train.steps and batch_size, the number of noise.alphas, controls"
    model_from = "student"
    own_text = True
    train: TrainConfig
    recover: float | None
    config: TeacherConfig = TeacherConfig()
    vocab_size: int | None = optional()
    hidden_weight: float = 0.0
    hidden_layers: list[int] | None = None
    on_policy: OnPolicyConfig = OnPolicyConfig()
    teacher: Stage | Folder
    student: Stage | Folder
    gate: Stage | Folder | None = optional()
    target: Stage | Folder | None = optional()
    cache: Stage | Folder | None = optional()

    def _json(self) -> dict[str, Any]:
        values = super()._json()
        del values["config"], values["on_policy"]
        own, hidden = self.on_policy.settings(), {name: values.pop(name) for name in ("hidden_weight", "hidden_layers")}
        config = self.config.settings()
        added = {"teacher": config, "hidden": hidden if self.hidden_weight else None, "on_policy": own}
        return {**values, **{name: value for name, value in added.items() if value}}

    @property
    def training(self) -> TrainConfig:
        return self.train

    def retrained(self, **settings: Any) -> Self:
        return dataclasses.replace(self, train=dataclasses.replace(self.train, **settings))

    @property
    def ruled(self) -> bool:
        return self.recover is not None

    # -- computation -----------------------------------------------------------------------------------------------------------

    def run(self, work: Work) -> dict[str, Any]:
        data = work.inputs["prepared"]
        student, text = load_to_train(work.inputs["student"], self.train.precision), distill_sequences(data)
        if self.gate is not None:
            text = text.take(kept_sequences(work.inputs["gate"], len(text)))
        teacher, reached, passes = self._teacher(work, student, text)
        size = self.vocab_size
        if size is None and teacher.vocabulary != vocabulary_of(student):
            size = common_tokens(work, teacher.vocabulary, vocabulary_of(student))
        stop, facts = None, {}
        if self.recover is not None:
            if self.target is not None:
                reached = retain_performance(load_model(work.inputs["target"]), data)
            reached = retain_performance(teacher.model, data) if reached is None else reached
            rule = Recovery(lambda: reached, data, self.recover)
            stop, facts["retain_target"] = rule.stop, rule.target
        result = distill(
            student,
            teacher,
            text,
            self.train,
            hidden_weight=self.hidden_weight,
            hidden_layers=self.hidden_layers,
            vocab_size=size,
            on_policy=self.on_policy,
            evaluate=validation(data, "retain"),
            stop=stop,
            folder=work.scratch,
            title=work.title,
        )
        save(student, load_tokenizer(data), work.output, self.train)
        drawn = self.on_policy.count(result.steps, self.train.steps)
        if self.on_policy:
            facts["on_policy_steps"] = drawn
        own = forward_flops(student, text.length) * (3 + drawn / max(result.steps, 1))  # drawing text costs a forward pass
        return {**facts, **training_facts(result, (own + passes) * result.positions["text"])}

    def _teacher(self, work: Work, student: PreTrainedModel, text: Sequences) -> tuple[Teacher, float | None, float]:
        """Returns the teacher, its retain performance if known, and its FLOPs per token."""
        folder = work.inputs["teacher"]
        if self.cache is not None:
            teacher = CachedTeacher.open(work.inputs["cache"], folder, self.config)
            passes = head_flops(student) if self.config.kind == "cached" else 0.0  # the cache counts those of the layers
            return teacher, cached_retain(work.inputs["cache"], work.inputs["prepared"]), passes
        if self.config.kind == "streamed":
            model = stream_model(folder)
        else:
            model = load_model(folder, self._teacher_dtype(stored_dtype(folder)))
        return ModelTeacher(model), None, forward_flops(model, text.length)

    def _teacher_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Dtype of a resident teacher: float32 for a float32 student, else the stored dtype, as published."""
        return torch.float32 if self.train.precision == "float32" else stored

    # -- memory and cost -------------------------------------------------------------------------------------------------------

    def memory(self, meta: Meta) -> list[Memory]:
        phases = meta.training(self.train, ("text",), lambda student: self._method(meta, student))
        if self.on_policy:
            forward = next(phase for phase in phases if phase.phase == "forward")
            drawing = drawing_bytes(meta.model(), self.train.micro_batch_size or self.train.batch_size, meta.length)
            phases.append(dataclasses.replace(forward, phase="drawing", activations=drawing, workspace=0))
        if self.config.kind != "resident":
            return phases
        dtype, own = self._teacher_dtype(meta.stored), meta.trained_dtype(self.train).itemsize * meta.elements
        weights, teacher = own + meta.reading(dtype), dtype.itemsize * meta.elements
        return [phases[0], Memory("loading", weights=weights, teacher=teacher), *phases[1:]]

    def _method(self, meta: Meta, student: PreTrainedModel) -> Method:
        config, model = self.config, meta.model().eval()
        if config.kind == "resident":
            model.to(self._teacher_dtype(meta.stored))
        meta.hold_teacher(model, {"resident": None, "streamed": meta.streamed_share(model)}.get(config.kind, 0.0))
        head = head_of(model)
        if config.kind == "cached":
            meta.hold([head.weight], "teacher")
        known, match = ModelTeacher(model), None
        vocab_size = self.vocab_size and min(self.vocab_size, len(head.weight))  # of ranks that share it, the head has a part
        if self.hidden_weight:
            match = matching(student, known, self.hidden_weight, self.hidden_layers)
            known = ModelTeacher(model, match.layers)

        def targets(batch: Batch) -> HiddenTargets | TopTargets:
            shape = (len(batch.input_ids), batch.input_ids.shape[1] - 1)
            if config.kind == "cached":
                packed = torch.empty(*shape, head.weight.shape[1], dtype=getattr(torch, config.dtype), device="meta")
                return HiddenTargets(packed.clone().to(head.weight.dtype), head)
            if config.kind == "topk":
                packed = [torch.empty(*shape, config.k, dtype=dtype, device="meta") for dtype in (torch.int32, torch.float32)]
                return TopTargets(*(tensor.clone() for tensor in packed))
            return known.targets(batch)

        return Method(
            lambda student, batches, counted: distillation(
                student, targets(batches["text"]), batches["text"], counted["text"], match, vocab_size
            )
        )

    def passes(self, scene: Scene) -> float:
        """Forward passes that a step costs: three for the student, and the teacher's; one more in a share of on-policy steps.

        The teacher costs one, with cached hidden states only the head's share of one, and with topk nothing.
        """
        if self.cache is None:
            return 4 + self.on_policy.count(self.train.steps, self.train.steps) / max(self.train.steps, 1)
        exact = self.config.kind == "cached"
        return 3 + (head_flops(scene.model) / forward_flops(scene.model, scene.length) if exact else 0)

    # -- less memory -----------------------------------------------------------------------------------------------------------

    def flag(self, name: str) -> str:
        return name if name.startswith("teacher.") else super().flag(name)

    def possible(self, name: str, value: Any) -> bool:
        """A cache holds neither the layers' hidden states nor outputs for new text, so it is not possible where these are needed."""
        if name == "teacher.kind":
            return not self.hidden_weight and not self.on_policy and self.config.kind == "resident"
        return super().possible(name, value)

    def changed(self, changes: Mapping[str, Any]) -> Self:
        train = {flag: value for flag, value in changes.items() if flag != "teacher.kind"}
        stage = super().changed(train)
        if "teacher.kind" not in changes:
            return stage
        size = stage.train.micro_batch_size or stage.train.batch_size
        config = TeacherConfig(changes["teacher.kind"], batch_size=size)
        cache = Cache(config=config, prepared=self.prepared, teacher=self.teacher, title="cache teacher")
        return dataclasses.replace(stage, config=config, cache=cache)


def common_tokens(work: Work, teacher: int, student: int) -> int:
    """Returns the smaller of two head sizes that differ only by padding.

    Raises:
        ValueError: the two models do not share one tokenizer whose tokens fit in the smaller head.
    """
    known, smaller = [_vocabulary(work.inputs[name]) for name in ("teacher", "student")], min(teacher, student)
    if known[0] is None or known[0] != known[1] or max(known[0].values()) >= smaller:
        folders = " and ".join(str(work.inputs[name]) for name in ("teacher", "student"))
        raise ValueError(
            f"student: got a vocabulary of {student}, wanted the teacher's {teacher}, or the same tokenizer in both of "
            f"{folders}, with at most {smaller} tokens; they have none, different ones, or more tokens"
        )
    console.print(
        f"{work.title}: the teacher's head has {teacher} vocabulary entries and the student's {student}; the first {smaller} "
        "count"
    )
    return smaller


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Token ids of a folder's tokenizer, by token; None if it has no tokenizer that can be loaded."""
    try:
        return load_tokenizer(folder).get_vocab()
    except (OSError, ValueError):
        return None
