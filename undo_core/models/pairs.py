"""Two models of one architecture, parameter by parameter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel


def paired(
    model: PreTrainedModel, other: PreTrainedModel, name: str = "original"
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns, by name, the parameters of both models; a parameter that ``model`` ties appears once.

    Where only ``other`` ties its head to its embedding, its one matrix is the partner of both. ``name`` is what an error calls ``other``.

    Raises:
        ValueError: the models differ in a parameter's name or shape, or only ``model`` ties its head.
    """
    own, theirs = dict(model.named_parameters()), dict(other.named_parameters(remove_duplicate=False))
    if unknown := sorted((own.keys() - theirs.keys()) | (dict(other.named_parameters()).keys() - own.keys())):
        raise ValueError(
            f"{name}: got a {type(other).__name__}, of which and of the model, a {type(model).__name__}, only one has "
            f"{unknown[0]} (of {len(unknown)} such); wanted models of one architecture"
        )
    for key, parameter in own.items():
        if parameter.shape != theirs[key].shape:
            raise ValueError(
                f"{name}: got {key} of shape {tuple(theirs[key].shape)}, wanted that of the model, {tuple(parameter.shape)}"
            )
    return {key: (parameter.detach(), theirs[key].detach()) for key, parameter in own.items()}


@contextlib.contextmanager
def on_the_line(model: PreTrainedModel, other: PreTrainedModel, share: float) -> Iterator[None]:
    """Context in which the parameters of ``model`` are ``(1 - share) * own + share * other``; restored on exit.

    At share 0 and 1 they have exactly the values of one of the models. Memory: a copy of the model.
    """
    pairs = paired(model, other, "against")
    before = {name: own.clone() for name, (own, _) in pairs.items()}
    try:
        for own, theirs in pairs.values():
            own.lerp_(theirs.to(own), share)
        yield
    finally:
        for name, (own, _) in pairs.items():
            own.copy_(before[name])
