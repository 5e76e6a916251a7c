"""What an unlearning method is, what may be wrapped around it, and the registers of both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.distillation.teacher import ModelTeacher
from undo_core.models import head_of
from undo_core.training.batches import Batch
from undo_core.training.config import TrainConfig
from undo_core.training.lean import choose_kernels
from undo_core.training.loop import Gradient, Loss, accumulate
from undo_core.training.losses import cross_entropy, distillation
from undo_core.training.precision import convert_


class Settings(Protocol):
    """What a method knows of :class:`undo_core.unlearning.UnlearnConfig`: what all have in common, and its own settings by its name."""

    method: str
    retain_weight: float
    retain_loss: str
    vocab_size: int | None
    forget_rows: int | None
    robust: str
    train: TrainConfig

    def __getattr__(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Method:
    """How a model is made to forget.

    Attributes:
        loss: over the sources ``forget`` and ``retain``.
        parameters: what it trains; None for all.
        reference: what is kept of each forget batch, ``[batch, length - 1]``, from the original model; computed before the first step and
            given to ``loss`` as the batch's ``reference``.
        gradient: how a step's gradient is made of the loss.
    """

    loss: Loss
    parameters: list[nn.Parameter] | None = None
    reference: Callable[[PreTrainedModel, Batch], torch.Tensor] | None = None
    gradient: Gradient = accumulate

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Only what the method trains requires a gradient inside the ``with`` block; everything as it was afterwards."""
        if self.parameters is None:
            yield
            return
        before = [(p, p.requires_grad) for p in model.parameters()]
        try:
            model.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)


Term = Callable[[PreTrainedModel, Batch, int], torch.Tensor]
"""``term(model, micro_batch, counted)``: as a :data:`Loss`, of one source."""


def forget_and_retain(forget: Term, model: PreTrainedModel, config: Settings) -> Loss:
    """``forget(forget text) + retain_weight * CE(retain text)``; with ``config.retain_loss`` kl ``KL(p_original || p)`` in the place of CE.

    ``model`` is still the original. retain is not run at weight 0.
    """
    head_of(model)  # what is refused is refused before anything is changed
    retain = kept(model, config) if config.retain_loss == "kl" else cross_entropy

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            terms.append(forget(model, batches["forget"], counted["forget"]))
        if "retain" in batches and config.retain_weight:
            terms.append(config.retain_weight * retain(model, batches["retain"], counted["retain"]))
        return sum(terms) if terms else torch.zeros((), requires_grad=True)

    return loss


def kept(model: PreTrainedModel, config: Settings) -> Term:
    """``KL(p_original || p)``, of the model as it is now. Memory: :func:`original_of`."""
    original = original_of(model, config)
    choose_kernels(original, config.train)  # the model's: at the first step the two differ by nothing
    teacher = ModelTeacher(original)
    return lambda model, batch, counted: distillation(model, teacher.targets(batch), batch, counted)


def original_of(model: PreTrainedModel, config: Settings) -> PreTrainedModel:
    """A copy of the model as it is now, its weights as those in training, without gradients, in evaluation mode."""
    original = copy.deepcopy(model).eval()
    convert_(original, config.train.precision)  # while it is known what is frozen
    return original.requires_grad_(False)


Costs = dict[str, float]
Flops = Callable[[PreTrainedModel, Settings, int], Costs]


@dataclass(frozen=True)
class Entry:
    """What is registered under a name; called, it makes the :class:`Method`.

    Attributes:
        make: of a method, ``(model, config) -> Method``; of a wrapper, ``(method, model, config) -> Method``.
        title: for people.
        settings: dataclass of what is its alone: the field of :class:`UnlearnConfig` that has its name.
        flops: ``(model, config, length)`` to FLOPs of a step for one position of each source; None for a forward and a backward pass.
            Of a wrapper: those that it adds to ``costs``, ``(costs, model, config, length)``.
        reference_flops: the same, of what is computed once; a wrapper adds nothing to it.
        check: raises a ValueError where the other settings cannot go with it.
        sums: whether its gradient is the same for any split into micro-batches.
        whole_rows: whether the model reads a row's last token too, which is a label alone elsewhere.
    """

    make: Callable[..., Method]
    title: str
    settings: type | None = None
    flops: Callable[..., Costs] | None = None
    reference_flops: Flops | None = None
    check: Callable[[Settings], None] | None = None
    sums: bool = True
    whole_rows: bool = False

    def __call__(self, *arguments: Any) -> Method:
        return self.make(*arguments)


METHODS: dict[str, Entry] = {}
ROBUST: dict[str, Entry] = {}


def register(name: str, title: str, **more: Any) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator: the function becomes the method ``name`` of :class:`UnlearnConfig`; ``more`` are fields of :class:`Entry`.

    Raises:
        ValueError: the name is taken.
    """
    return _register(METHODS, name, title, more)


def register_robust(name: str, title: str, **more: Any) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """:func:`register` for what wraps a method."""
    return _register(ROBUST, name, title, more)


def _register(into: dict[str, Entry], name: str, title: str, more: dict[str, Any]) -> Callable[..., Any]:
    def decorate(make: Callable[..., Method]) -> Callable[..., Method]:
        if name in METHODS or name in ROBUST:
            raise ValueError(f"name: got {name!r}, which is registered already; wanted another")
        into[name] = Entry(make, title, **more)
        return make

    return decorate
