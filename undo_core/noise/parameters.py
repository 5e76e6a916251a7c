"""Selects the parameters of a model that noise or other damage changes, and the value that each shrinks toward.

:func:`undo_core.noise_` states the policy. Noise and other damage, in memory and on disk, all use :func:`select`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import NoiseRule, Parameter, Target, canonical_name, describe, matches

from undo_core.models.adapters import has_adapters
from undo_core.noise.initialisation import initialisation, matrix_shapes

Parts = Literal["text", "all"]
PARTS = ("text", "all")
Reason = Literal["frozen", "not text", "no initial value"]

# A configuration or module with one of these in its name belongs to a modality other than text.
_OTHER = ("vision", "visual", "image", "img", "video", "audio", "speech", "codec", "vq_", "vqmodel", "vqvae")


@dataclass(frozen=True)
class Left:
    """A parameter that is left unchanged.

    Attributes:
        reason: "frozen" (it requires no gradient, now or in a new model of the class), "not text" (it belongs to images or
            sound), or "no initial value" (it is not a matrix, and the model's initialisation does not set it).
        elements: its number of elements.
        share: ``elements`` as a share of all elements of the model, in [0, 1].
    """

    reason: Reason
    elements: int
    share: float


@dataclass(frozen=True)
class Selection:
    """Result of :func:`select`.

    Attributes:
        found: tensor and description of each parameter to damage, by canonical name; a tied parameter appears once.
        toward: the target of each parameter without noise, by canonical name; None for a module that is not a Hugging Face
            model.
        left: the parameters that stay unchanged.
        rules: the given rules, without those that only spare parameters which stay unchanged anyway.
    """

    found: dict[str, tuple[torch.Tensor, Parameter]]
    toward: dict[str, Target] | None
    left: dict[str, Left]
    rules: tuple[NoiseRule, ...]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors in ``found``, by canonical name."""
        return {name: tensor for name, (tensor, _) in self.found.items()}

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The descriptions in ``found``, by canonical name."""
        return {name: parameter for name, (_, parameter) in self.found.items()}


def select(model: nn.Module, parts: Parts = "text", rules: Sequence[NoiseRule] = (), own_values: bool = True) -> Selection:
    """Selects the parameters of ``model`` to damage.

    Args:
        model: a Hugging Face model, wrapped or not, or any module; it may be on the meta device.
        parts: "text" or "all".
        rules: rules of the noise. A parameter without an initial value is selected if a rule gives it a target or a law.
        own_values: whether parameters without noise shrink toward their initial values. If so, those without one stay
            unchanged.

    Raises:
        ValueError: as :func:`undo_kernels.ops.noise_rules.describe`; the model contains adapters of peft; no parameter is left
            to damage; or a rule matches only parameters that stay unchanged.
    """
    if has_adapters(model):
        checks.fail(
            "model",
            f"{type(model).__name__} with adapters, whose effective weights combine base and adapters",
            "them merged (model.merge_and_unload().requires_grad_()), or the base before it gets adapters",
        )
    checks.choice("parts", parts, PARTS)
    if not all(isinstance(rule, NoiseRule) for rule in rules):
        checks.fail("rules", rules, "a sequence of NoiseRule")
    found = describe(model)
    sizes = {canonical_name(name): parameter.numel() for name, parameter in model.named_parameters()}
    total = max(sum(sizes.values()), 1)
    left: dict[str, Left] = {}

    def leave(name: str, reason: Reason) -> None:
        left[name] = Left(reason, sizes[name], sizes[name] / total)
        found.pop(name, None)

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            leave(canonical_name(name), "frozen")
    prefix, inner = _hugging_face(model)
    if inner is None:
        return Selection(found, None, left, _about(rules, found, left))
    start = initialisation(inner)
    starts = {canonical_name(prefix + name): value for name, value in start.values.items()}
    for name in {canonical_name(prefix + name) for name in start.frozen} & found.keys():
        leave(name, "frozen")
    shapes, output = matrix_shapes(inner), inner.get_output_embeddings()
    head = set() if output is None else {id(parameter) for parameter in output.parameters()}
    found = {
        name: (tensor, replace(p, matrix=shapes.get(id(tensor)), head=id(tensor) in head))
        for name, (tensor, p) in found.items()
    }
    if parts == "text":
        other = {id(parameter) for parameter in inner.parameters()} - {id(parameter) for parameter in text_parameters(inner)}
        for name, (tensor, _) in list(found.items()):
            if id(tensor) in other:
                leave(name, "not text")
    toward: dict[str, Target] = {}
    for name, (tensor, parameter) in list(found.items()):
        if name not in starts and parameter.role != "vectors":
            continue
        described = found[name] = tensor, replace(parameter, role="vectors", stacked=False, matrix=None)
        value = starts.get(name)
        if isinstance(value, torch.Tensor) and value.shape != tensor.shape:
            value = None
        if value is not None:
            toward[name] = value
        elif own_values and not any(_sets_target(rule) and matches(rule.match, name, described[1]) for rule in rules):
            leave(name, "no initial value")
    if not found:
        checks.fail("model", f"no parameter to damage: {summary(left)} are left", "a model with some, or parts='all'")
    return Selection(found, toward, left, _about(rules, found, left))


def text_parameters(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """Yields the parameters of the text decoder, its embeddings and its head; of a model of text alone, every parameter.

    If the configuration has a part of its own for text, only the decoder (``get_decoder``) and the input and output embeddings
    are text. A parameter is not text if it lies inside a model with another modality's configuration, or if a multimodal
    model's name for it contains such a modality.
    """
    config = model.config
    parts = {name: getattr(config, name, None) for name in config.sub_configs}
    others = tuple(type(part) for name, part in parts.items() if part is not None and _named_otherwise(name))
    decoder, roots = model.get_decoder(), [model]
    text = config.get_text_config(decoder=True)
    nested = any(part is text for part in parts.values())
    if nested and decoder is not model and decoder is not model.base_model:
        roots = [decoder, model.get_input_embeddings(), model.get_output_embeddings()]
    inside = {id(parameter) for root in roots if root is not None for parameter in root.parameters()}
    if others:
        towers = [module for module in model.modules() if isinstance(module, PreTrainedModel) and type(module.config) in others]
        inside -= {id(parameter) for tower in towers for parameter in tower.parameters()}
    multimodal = bool(others) or len(roots) > 1
    for name, parameter in model.named_parameters():
        if id(parameter) in inside and not (multimodal and any(map(_named_otherwise, name.split(".")))):
            yield parameter


def summary(left: Mapping[str, Left]) -> str:
    """Returns ``12 parameters (3,456 elements, 7.8% of the model): not text`` for each reason, joined by ``; ``."""
    reasons: dict[str, list[Left]] = {}
    for one in left.values():
        reasons.setdefault(one.reason, []).append(one)
    return "; ".join(
        f"{len(parts)} parameters ({sum(p.elements for p in parts):,} elements, {sum(p.share for p in parts):.1%} of the "
        f"model): {reason}"
        for reason, parts in reasons.items()
    )


def _hugging_face(model: nn.Module) -> tuple[str, PreTrainedModel | None]:
    """Returns the name prefix of the outermost Hugging Face model in ``model``, and that model; ``model`` may be a wrapper."""
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return f"{name}." if name else "", module
    return "", None


def _named_otherwise(name: str) -> bool:
    return any(word in name.lower() for word in _OTHER)


def _sets_target(rule: NoiseRule) -> bool:
    return rule.toward is not None or rule.law is not None


def _about(
    rules: Sequence[NoiseRule], found: Mapping[str, tuple[torch.Tensor, Parameter]], left: Mapping[str, Left]
) -> tuple[NoiseRule, ...]:
    """Returns the rules without those that only spare parameters which stay unchanged anyway (``alpha=0``).

    Raises:
        ValueError: another rule matches only parameters that stay unchanged.
    """
    kept = []
    for i, rule in enumerate(rules):
        if not any(matches(rule.match, name, p) for name, (_, p) in found.items()):
            name = next((name for name in left if matches(rule.match, name, Parameter((), "vectors"))), None)
            if name is not None and rule.alpha == 0:
                continue
            if name is not None:
                wanted = "parts='all'" if left[name].reason == "not text" else "a rule for a parameter that is damaged"
                checks.fail(f"rules[{i}].match", f"{rule.match!r}, and {name} is left: {left[name].reason}", wanted)
        kept.append(rule)
    return tuple(kept)
