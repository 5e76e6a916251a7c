"""Distillation: train the damaged model to match the logits of the suppressed model on unlabeled text."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core import distributed
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.distillation.on_policy import OnPolicyConfig, Prompts, continued
from undo_core.distillation.teacher import ModelTeacher, Teacher, as_teacher, teacher_identity
from undo_core.distributed.sharding import shard
from undo_core.distributed.vocabulary import divide, divided
from undo_core.models import Head, check_continues, check_vocab_size, head_of, vocabulary_of
from undo_core.training import Batch, Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.losses import HiddenTargets, Match, distillation


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    text: Sequences | Source | Iterable[Any],
    config: TrainConfig | None = None,
    *,
    hidden_weight: float = 0.0,
    hidden_layers: Sequence[int] | None = None,
    vocab_size: int | None = None,
    on_policy: OnPolicyConfig | None = None,
    folder: Path | None = None,
    title: str = "distill",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Trains ``student`` in place to match ``teacher``: forward KL(teacher || student) at temperature 1 on every token.

    Args:
        student: the damaged model; trained in place. Of a ``PeftModel`` only the adapters are trained.
        teacher: the suppressed model; its weights are not changed, and it is put in evaluation mode (on several ranks it is
            sharded). Or a teacher that takes
            less memory: streamed from disk (:class:`undo_core.distillation.teacher.ModelTeacher`), or cached
            (:class:`undo_core.distillation.cache.CachedTeacher`).
        text: all unlabeled text, forget text included (arXiv 2506.06278): token sequences, a function of the step, or an
            iterable of batches. A cached teacher needs the sequences that it was made from.
        config: optimizer, rates, batch sizes.
        hidden_weight: factor on a second term: the squared error of the student's hidden states relative to the teacher's, per
            token, averaged over ``hidden_layers``. Needs a teacher that is a model. 0 disables the term.
        hidden_layers: the matched hidden states, each given as a number of layers: 0 is the embeddings, the largest number is
            after the final norm. None for every layer.
        vocab_size: number of real tokens if a head has more vocabulary entries; the others are padding, without probability or
            gradient. None takes a cache's own number, or else all entries; if the two heads differ, it takes the smaller number
            and warns, since models with the same tokenizer are often padded differently.
        on_policy: which steps train on continuations that the student draws itself, by the reverse KL; None for none. Needs a
            teacher that is a model, and text without position ids.
        folder: for checkpoints and the log, so that a killed run resumes. A different student, teacher, text, ``config`` or
            ``hidden_weight`` or ``on_policy`` raises an error that names it; the comparison computes one digest of both models' weights, about a
            second per gigabyte in float32.
        title: label of the progress bar.
        progress: whether to show the progress bar.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Memory: with ``hidden_weight``, three times the hidden states of the matched layers. In an on-policy step, the keys and values of a
    micro-batch, and the logits of one token of each of its sequences, before its forward pass.

    Raises:
        UnsupportedHead: the student's head is not a linear layer with optional bias, scale and softcap.
        ValueError: a ``vocab_size`` above the vocabulary of a head, models of different width or depth with ``hidden_weight``,
            data of an unknown form, or data that a cached teacher was not made from.
    """
    config = config or TrainConfig(steps=1000, batch_size=128, lr=7e-4, warmup=50)
    known = as_teacher(teacher)
    _check_apart(student, known)
    head_of(student)  # raises before anything is changed
    vocab_size = common_vocabulary(student, known, vocab_size)
    own, other = vocabulary_of(student), known.vocabulary
    if distributed.tensor() > 1 and own != other and getattr(known, "kind", None) != "topk":
        raise ValueError(
            f"parallel.tensor: got {distributed.tensor()} for heads of {own} and {other} vocabulary entries, wanted 1, or equal numbers, "
            "of which a rank holds the same ones"
        )
    known.check(text)
    on_policy = on_policy or OnPolicyConfig()
    if on_policy:
        on_policy.check(getattr(known, "kind", ""), int(text.lengths.max()) if isinstance(text, Sequences) else None)
        if distributed.tensor() > 1:
            raise ValueError(
                f"parallel.tensor: got {distributed.tensor()} with on_policy, wanted 1: it draws from a whole head"
            )
        check_continues(student)  # now, because the first on-policy step may be late
    limits = limits_of(student, *([known.model] if isinstance(known, ModelTeacher) else []))
    match = None
    if hidden_weight:
        match = matching(student, known, hidden_weight, hidden_layers)
        known = ModelTeacher(known.model, match.layers)

    own_sums = getattr(known, "vocab_size", None) == vocab_size  # a cache's log-sum-exps hold only for its own vocab_size

    def loss(student: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        batch, divergence = batches["text"], "forward"
        if batch.reference is not None:
            batch, divergence = continued(student, batch, on_policy.prompt, vocab_size), "reverse"
        targets = known.targets(batch)
        if isinstance(targets, HiddenTargets) and not own_sums:
            targets = dataclasses.replace(targets, lse=None)
        return distillation(student, targets, batch, counted["text"], match, vocab_size, divergence)

    source = as_source(text, size=config.batch_size, seed=config.seed or 0, name="text", limits=limits)
    if on_policy:
        source = Prompts(source, on_policy, config.steps, config.seed or 0)
    settings = {}
    if folder is not None:
        settings = {
            "vocab_size": vocab_size,
            "teacher": teacher_identity(known),
            "matched": None if match is None else dataclasses.asdict(match),
            **({"on_policy": on_policy.settings()} if on_policy else {}),
        }
    known = _spread(known)
    return train(
        student,
        loss,
        {"text": source},
        config,
        folder=folder,
        settings={**settings, **(train_options.pop("settings", None) or {})},
        title=title,
        progress=progress,
        **train_options,
    )


def _spread(teacher: Teacher) -> Teacher:
    """Returns the teacher with its weights divided among the ranks, or its head among those that share heads."""
    layout = distributed.layout()
    if isinstance(teacher, ModelTeacher) and not hasattr(teacher.model, "_undo_reader"):
        shard(teacher.model)
    elif isinstance(teacher, ModelTeacher) and layout is not None:  # the layers of a streamed teacher stay on disk
        divide(teacher.model, layout)
    elif layout is not None and isinstance(getattr(teacher, "head", None), Head):  # of a cache
        teacher = copy.copy(teacher)
        teacher.head = divided(teacher.head, layout)
    return teacher


def _check_apart(student: nn.Module, teacher: Teacher) -> None:
    """Raises a ValueError if the teacher shares trained parameters; peft inserts adapters into the model that it is given."""
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [n for n, p in teacher.model.named_parameters() if id(p) in trained] if isinstance(teacher, ModelTeacher) else []
    if shared:
        raise ValueError(
            f"teacher: got a model whose {shared[0]} is also the student's and would be trained; wanted a copy of it"
        )


def common_vocabulary(student: PreTrainedModel, teacher: Teacher, vocab_size: int | None) -> int | None:
    """Returns the ``vocab_size`` over which both heads are compared; None for all entries of both.

    Raises:
        ValueError: ``vocab_size`` exceeds the vocabulary of a head, or differs from that of a cache.
    """
    sizes, cached = {"student": vocabulary_of(student), "teacher": teacher.vocabulary}, getattr(teacher, "vocab_size", None)
    check_vocab_size(vocab_size, **sizes)
    if cached is not None and vocab_size not in (None, cached):
        raise ValueError(f"vocab_size: got {vocab_size} with a cache of vocab_size {cached}, wanted the cache's, or None")
    chosen = cached if vocab_size is None else vocab_size
    smaller = min(sizes.values())
    if chosen is None and len(set(sizes.values())) > 1:
        warnings.warn(
            f"vocab_size: got None for a student of {sizes['student']} vocabulary entries and a teacher of {sizes['teacher']}; "
            f"taking {smaller}, as for two models of one tokenizer whose heads are padded differently. With different "
            "tokenizers the result means nothing.",
            stacklevel=3,
        )
        chosen = smaller
    if chosen is not None and chosen > smaller:
        raise ValueError(
            f"student: got {sizes['student']} vocabulary entries, wanted at least the {chosen} of the cache's vocab_size"
        )
    if getattr(teacher, "kind", None) == "topk" and (cached or teacher.vocabulary) != (chosen or teacher.vocabulary):
        raise ValueError(
            f"teacher: got a topk cache over {cached or teacher.vocabulary} tokens for a vocab_size of {chosen}, wanted one "
            f"made with TeacherConfig(vocab_size={chosen})"
        )
    return chosen


def matching(student: PreTrainedModel, teacher: Teacher, weight: float, layers: Sequence[int] | None) -> Match:
    """Returns the :class:`Match` of student and teacher hidden states; ``layers`` None matches every layer.

    Raises:
        ValueError: an invalid weight or layer, a teacher that is not a model, or models of different width or depth.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"hidden_weight: got {weight}, wanted a finite number >= 0")
    if not isinstance(teacher, ModelTeacher):
        raise ValueError(
            f"hidden_weight: got {weight} with {type(teacher).__name__}, which has no layers; wanted a resident or streamed "
            "teacher"
        )
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (m.config.get_text_config() for m in (student, teacher.model))]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"student: got {shapes[0][0]} layers of width {shapes[0][1]}, wanted the teacher's {shapes[1][0]} of "
            f"{shapes[1][1]}, to match hidden states"
        )
    count = shapes[0][0]
    chosen = tuple(range(1, count + 1) if layers is None else layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer <= count for layer in chosen):
        raise ValueError(f"hidden_layers: got {list(chosen)}, wanted different numbers from 0 to {count}")
    return Match(weight, chosen)
