"""Unlearning methods and wrappers around them: their interface, and the registries of both."""

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
from undo_core.distributed.sharding import shard
from undo_core.models import head_of
from undo_core.training.batches import Batch, Source
from undo_core.training.config import TrainConfig
from undo_core.training.loop import Gradient, Loss, accumulate
from undo_core.training.losses import cross_entropy, distillation
from undo_core.training.memory_savers import choose_kernels
from undo_core.training.precision import convert_


class Settings(Protocol):
    """View of :class:`undo_core.unlearning.UnlearnConfig` for methods: the common settings, and a method's own by its name."""

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
    """An unlearning method for one model.

    Attributes:
        loss: loss of a step over the sources ``forget`` and ``retain``.
        parameters: the parameters to train; None for all.
        reference: function that computes values ``[batch, length - 1, ...]`` of the original model for a forget batch. It runs
            before the first step; ``loss`` receives the values as the batch's ``reference``.
        gradient: function that computes the gradient of a step from the loss.
        prepare: function that reads what it needs of the original model and of the forget batches of all steps; it runs before
            the first step, also of a resumed run, while only the trained parameters require a gradient.
    """

    loss: Loss
    parameters: list[nn.Parameter] | None = None
    reference: Callable[[PreTrainedModel, Batch], torch.Tensor] | None = None
    gradient: Gradient = accumulate
    prepare: Callable[[PreTrainedModel, Source], None] | None = None

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Context in which only the trained parameters require a gradient; restored on exit."""
        if self.parameters is None:
            yield
            return
        before = [parameter.requires_grad for parameter in model.parameters()]
        try:
            model.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            # Training on several ranks replaces the parameters by their shards.
            for parameter, required in zip(model.parameters(), before, strict=True):
                parameter.requires_grad_(required)


Term = Callable[[PreTrainedModel, Batch, int], torch.Tensor]
"""``term(model, micro_batch, counted)``: like a :data:`Loss`, but for one source."""


def forget_and_retain(forget: Term, model: PreTrainedModel, config: Settings) -> Loss:
    """Returns the loss ``forget(forget text) + retain_weight * CE(retain text)``.

    With ``config.retain_loss`` kl, ``KL(p_original || p)`` replaces CE, and with jsd their Jensen-Shannon divergence. ``model``
    must still be the original model. At ``retain_weight`` 0 the retain text is not run.
    """
    head_of(model)  # raises before anything is changed
    retain = cross_entropy if config.retain_loss == "cross-entropy" else kept(model, config)

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            terms.append(forget(model, batches["forget"], counted["forget"]))
        if "retain" in batches and config.retain_weight:
            terms.append(config.retain_weight * retain(model, batches["retain"], counted["retain"]))
        return sum(terms) if terms else torch.zeros((), requires_grad=True)

    return loss


def kept(model: PreTrainedModel, config: Settings) -> Term:
    """Returns the divergence that ``config.retain_loss`` names from the model as it is now. Memory: :func:`original_of`."""
    original = original_of(model, config)
    choose_kernels(original, config.train)  # the kernel of the training, so that the KL is exactly 0 at the first step
    teacher = ModelTeacher(original)
    divergence = "jsd" if config.retain_loss == "jsd" else "forward"
    return lambda model, batch, counted: distillation(model, teacher.targets(batch), batch, counted, divergence=divergence)


def original_of(model: PreTrainedModel, config: Settings) -> PreTrainedModel:
    """Returns a copy of the model as it is now: in the dtype of the training, without gradients, in evaluation mode.

    Memory: one more model; on several ranks its shards, and all of it for a moment.
    """
    original = copy.deepcopy(model).eval()
    convert_(original, config.train.precision)  # before requires_grad_, as it depends on which parameters are frozen
    shard(original.requires_grad_(False))
    return original


Costs = dict[str, float]
Flops = Callable[[PreTrainedModel, Settings, int], Costs]


@dataclass(frozen=True)
class Entry:
    """Registry entry of a method or wrapper; calling it makes the :class:`Method`.

    Attributes:
        make: ``(model, config) -> Method`` for a method; ``(method, model, config) -> Method`` for a wrapper.
        title: display name.
        settings: dataclass of the settings of this method alone, which become the field of :class:`UnlearnConfig` with its
            name.
        flops: ``(model, config, length)`` to the FLOPs of a step per position of each source; None for a forward and a backward
            pass. For a wrapper: ``(costs, model, config, length)`` to the FLOPs that it adds to ``costs``.
        reference_flops: like ``flops``, for what is computed once before the first step; a wrapper adds nothing to it.
        check: raises a ValueError if the other settings are not compatible with it.
        sums: whether the gradient is the same for any split into micro-batches.
        whole_sequences: whether the model also reads the last token of a sequence; for other methods that token is only a
            label.
    """

    make: Callable[..., Method]
    title: str
    settings: type | None = None
    flops: Callable[..., Costs] | None = None
    reference_flops: Flops | None = None
    check: Callable[[Settings], None] | None = None
    sums: bool = True
    whole_sequences: bool = False

    def __call__(self, *arguments: Any) -> Method:
        return self.make(*arguments)


def check_whole_gradient(config: Settings) -> None:
    """Raises a ValueError for training settings that a wrapper which moves the weights and keeps their gradients does not support.

    With ``step_in_backward`` the whole gradient never exists. In 16 bits, a small change of a weight is lost to rounding. With
    adamw-offload the gradients are on the host, not beside the weights.
    """
    train = config.train
    for name, value, wanted in (
        ("precision", train.precision, "float32"),
        ("step_in_backward", train.step_in_backward, False),
    ):
        if value != wanted:
            raise ValueError(f"robust: got {config.robust} with train.{name} {value}, wanted {wanted} with it")
    if train.optimizer == "adamw-offload":
        raise ValueError(
            f"robust: got {config.robust} with train.optimizer adamw-offload, wanted another optimizer: it needs the gradients on "
            "the device of the weights"
        )


METHODS: dict[str, Entry] = {}
ROBUST: dict[str, Entry] = {}


def register(name: str, title: str, **more: Any) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator that registers a function as method ``name`` of :class:`UnlearnConfig`; ``more`` are fields of :class:`Entry`.

    Raises:
        ValueError: the name is already registered.
    """
    return _register(METHODS, name, title, more)


def register_robust(name: str, title: str, **more: Any) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Decorator like :func:`register`, for a function that wraps a method."""
    return _register(ROBUST, name, title, more)


def _register(into: dict[str, Entry], name: str, title: str, more: dict[str, Any]) -> Callable[..., Any]:
    def decorate(make: Callable[..., Method]) -> Callable[..., Method]:
        if name in METHODS or name in ROBUST:
            raise ValueError(f"name: got {name!r}, which is registered already; wanted another")
        into[name] = Entry(make, title, **more)
        return make

    return decorate
