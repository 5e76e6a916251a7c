"""Distillation: match the suppressed model's logits from the damaged one, on unlabeled text."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.data.limits import limits_of
from undo_core.data.rows import Rows
from undo_core.distillation.teacher import ModelTeacher, Teacher, as_teacher, teacher_identity
from undo_core.models import check_vocab_size, head_of, vocabulary_of
from undo_core.training import Batch, Source, TrainConfig, TrainResult, as_source, train
from undo_core.training.losses import HiddenTargets, Match, distillation


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | Teacher,
    text: Rows | Source | Iterable[Any],
    config: TrainConfig | None = None,
    *,
    hidden_weight: float = 0.0,
    hidden_layers: Sequence[int] | None = None,
    vocab_size: int | None = None,
    folder: Path | None = None,
    title: str = "distill",
    progress: bool = True,
    **train_options: Any,
) -> TrainResult:
    """Train ``student`` in place to match ``teacher``: forward KL(teacher || student) at temperature 1 on every token.

    Args:
        student: the damaged model; trained in place. Of a ``PeftModel`` the adapters are trained.
        teacher: the suppressed model; left as it is, in evaluation mode. Or a teacher that takes less memory: streamed from disk
            (:class:`undo_core.distillation.teacher.ModelTeacher`), or cached (:class:`undo_core.distillation.cache.CachedTeacher`).
        text: the whole mix, unlabeled, forget text included (arXiv 2506.06278): token rows, a function of the step, or an iterable;
            a cached teacher knows the rows that it was made from.
        config: optimizer, rates, batch sizes.
        hidden_weight: factor on a second term, the squared error of the student's hidden states relative to the teacher's own, token by
            token, a mean over ``hidden_layers``; needs a teacher that is a model. 0 leaves it out.
        hidden_layers: after how many layers; the last is after the final norm, 0 the embeddings. None for every layer.
        vocab_size: number of real tokens, where a head has more rows than that: the rest is padding, without probability or gradient.
            None takes all rows, a cache's own number, or, where the two heads differ, the smaller number of rows, with a warning:
            models of one tokenizer are often padded differently.
        folder: for checkpoints and the log, so that a killed run resumes. Another student, teacher, text, ``config`` or
            ``hidden_weight`` is refused there by name; that costs one digest of both models' weights, about a second for each
            gigabyte in float32.
        title: name on the progress bar.
        progress: show it.
        train_options: passed to :func:`undo_core.training.train` (``evaluate``, ``stop``).

    Memory: with ``hidden_weight``, three times the hidden states of the matched layers.

    Raises:
        UnsupportedHead: a student whose head is not a linear layer with bias, scale and softcap.
        ValueError: a ``vocab_size`` above the rows of a head, different widths and layers where these are matched, data of no known form, or data that a cached teacher does not know.
    """
    config = config or TrainConfig(steps=1000, batch_size=128, lr=7e-4, warmup=50)
    known = as_teacher(teacher)
    _check_apart(student, known)
    head_of(student)  # what is refused is refused before anything is changed
    vocab_size = common_vocabulary(student, known, vocab_size)
    known.check(text)
    limits = limits_of(student, *([known.model] if isinstance(known, ModelTeacher) else []))
    match = None
    if hidden_weight:
        match = matching(student, known, hidden_weight, hidden_layers)
        known = ModelTeacher(known.model, match.layers)

    own_sums = getattr(known, "vocab_size", None) == vocab_size  # a cache's log-sum-exps are of its own number of tokens

    def loss(student: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        targets = known.targets(batches["text"])
        if isinstance(targets, HiddenTargets) and not own_sums:
            targets = dataclasses.replace(targets, lse=None)
        return distillation(student, targets, batches["text"], counted["text"], match, vocab_size)

    source = as_source(text, size=config.batch_size, seed=config.seed or 0, name="text", limits=limits)
    settings = {}
    if folder is not None:
        settings = {
            "vocab_size": vocab_size,
            "teacher": teacher_identity(known),
            "matched": None if match is None else dataclasses.asdict(match),
        }
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


def _check_apart(student: nn.Module, teacher: Teacher) -> None:
    """Raise a ValueError where the teacher would move with the student; peft puts adapters into the model that it is given."""
    trained = {id(parameter) for parameter in student.parameters() if parameter.requires_grad}
    shared = [n for n, p in teacher.model.named_parameters() if id(p) in trained] if isinstance(teacher, ModelTeacher) else []
    if shared:
        raise ValueError(
            f"teacher: got a model whose {shared[0]} is also the student's and would be trained; wanted a copy of it"
        )


def common_vocabulary(student: PreTrainedModel, teacher: Teacher, vocab_size: int | None) -> int | None:
    """The ``vocab_size`` that both heads are compared over; None for all rows of both.

    Raises:
        ValueError: more than a head has rows, or another number than a cache was made with.
    """
    rows, cached = {"student": vocabulary_of(student), "teacher": teacher.vocabulary}, getattr(teacher, "vocab_size", None)
    check_vocab_size(vocab_size, **rows)
    if cached is not None and vocab_size not in (None, cached):
        raise ValueError(f"vocab_size: got {vocab_size} with a cache of vocab_size {cached}, wanted the cache's, or None")
    chosen = cached if vocab_size is None else vocab_size
    smaller = min(rows.values())
    if chosen is None and len(set(rows.values())) > 1:
        warnings.warn(
            f"vocab_size: got None for a student of {rows['student']} rows and a teacher of {rows['teacher']}; taking {smaller}, as for two "
            "models of one tokenizer whose heads are padded differently. With different tokenizers the result means nothing.",
            stacklevel=3,
        )
        chosen = smaller
    if chosen is not None and chosen > smaller:
        raise ValueError(f"student: got {rows['student']} rows, wanted at least the {chosen} of the cache's vocab_size")
    if getattr(teacher, "kind", None) == "topk" and (cached or teacher.vocabulary) != (chosen or teacher.vocabulary):
        raise ValueError(
            f"teacher: got a topk cache over {cached or teacher.vocabulary} tokens for a vocab_size of {chosen}, wanted one made with "
            f"TeacherConfig(vocab_size={chosen})"
        )
    return chosen


def matching(student: PreTrainedModel, teacher: Teacher, weight: float, layers: Sequence[int] | None) -> Match:
    """What of the hidden states is matched.

    Raises:
        ValueError: a bad weight or layer, a teacher that is no model, or models of different widths or numbers of layers.
    """
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"hidden_weight: got {weight}, wanted a finite number >= 0")
    if not isinstance(teacher, ModelTeacher):
        raise ValueError(
            f"hidden_weight: got {weight} with {type(teacher).__name__}, which knows no layers; wanted a resident or streamed teacher"
        )
    shapes = [(c.num_hidden_layers, c.hidden_size) for c in (m.config.get_text_config() for m in (student, teacher.model))]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"student: got {shapes[0][0]} layers of width {shapes[0][1]}, wanted the teacher's {shapes[1][0]} of {shapes[1][1]}, to match "
            f"hidden states"
        )
    count = shapes[0][0]
    chosen = tuple(range(1, count + 1) if layers is None else layers)
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer <= count for layer in chosen):
        raise ValueError(f"hidden_layers: got {list(chosen)}, wanted different numbers from 0 to {count}")
    return Match(weight, chosen)
