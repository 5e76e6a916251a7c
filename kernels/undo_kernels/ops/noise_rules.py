"""Decides what happens to each parameter (law, strength, target of shrinking) from names, shapes and roles alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from undo_kernels.noise_segments import amplitude
from undo_kernels.ops import checks
from undo_kernels.ops.layout import check_apart
from undo_kernels.ops.sharding import local_of

LAWS = ("xavier_uniform", "xavier_normal", "normal")
ROLES = ("matrices", "vectors", "embeddings")
HEAD = "head"
CLASSES = (*ROLES, HEAD)
Target = float | torch.Tensor
Toward = float | Mapping[str, Target] | Callable[[str, torch.Tensor], Target]

_NOT = "not "
_WRAPPERS = ("_orig_mod.", "module.", "base_model.model.")


@dataclass(frozen=True)
class NoiseRule:
    """Other settings for some parameters; None keeps the value of the earlier rules or of the call.

    Attributes:
        match: a glob over canonical names (``*.mlp.*``), or ``matrices`` (of two or more dimensions, except embeddings),
            ``vectors`` (all others: norms, biases and parameters that are not the matrix of a product), ``embeddings``, ``head``
            (the output layer of a Hugging Face model, which may share its weight with an embedding), or layers by number
            (``layers:0-3,7``); ``not`` before any of these (``not layers:4-9``) matches all others.
        alpha: strength, in [0, 1]; 0 leaves the parameter unchanged.
        beta: scale of the noise, >= 0.
        law: distribution of ``N``. Vectors get noise only from a rule that gives them the normal law.
        std: standard deviation of the normal law.
        toward: value that the vectors shrink toward.
    """

    match: str
    alpha: float | None = None
    beta: float | None = None
    law: Literal["xavier_uniform", "xavier_normal", "normal"] | None = None
    std: float | None = None
    toward: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            checks.fail(
                "match", checks.shown(self.match), "a glob over parameter names, layers:0-3,7 or one of " + ", ".join(CLASSES)
            )
        if self.match.removeprefix(_NOT).startswith(_NOT):
            checks.fail("match", checks.shown(self.match), "one 'not' at most")
        layers_of(self.match)
        _strengths(self.alpha, self.beta)
        if self.law is not None:
            checks.choice("law", self.law, LAWS)
        for name in ("std", "toward"):
            if getattr(self, name) is not None:
                checks.number(name, getattr(self, name), "a finite number", 0 if name == "std" else -checks.LARGEST)


@dataclass(frozen=True)
class Parameter:
    """The properties of a parameter that decide its noise.

    Attributes:
        shape: full shape.
        role: matrices, vectors or embeddings.
        stacked: further dimensions count matrices ``[..., out, in]`` (experts); else they are a receptive field (convolutions).
        matrix: shape of the matrix whose fans count, if ``shape`` does not determine it.
        head: whether it belongs to the output layer; then it may be an embedding too.
    """

    shape: tuple[int, ...]
    role: Literal["matrices", "vectors", "embeddings"]
    stacked: bool = False
    matrix: tuple[int, ...] | None = None
    head: bool = False


@dataclass(frozen=True)
class Setting:
    """``theta <- keep * theta + scale * N`` for one parameter, as :class:`undo_kernels.noise_segments.Segment` has it."""

    law: Literal["uniform", "normal", "constant", "elements"]
    keep: float
    scale: float
    target: torch.Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Policy:
    """The checked arguments of a call of :func:`undo_kernels.ops.noise_`."""

    alpha: float
    beta: float
    law: str = "xavier_uniform"
    std: float | None = None
    rules: tuple[NoiseRule, ...] = ()

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, "a number in [0, 1]", 0, 1)
        checks.number("beta", self.beta, "a number >= 0", 0)
        checks.choice("law", self.law, LAWS)
        if self.law == "normal":
            checks.number("std", self.std, "a number >= 0 with law='normal'", 0)
        elif self.std is not None:
            checks.fail("std", self.std, f"None with law={self.law!r}: its spread comes from the shape")
        if not all(isinstance(rule, NoiseRule) for rule in self.rules):
            checks.fail("rules", self.rules, "a sequence of NoiseRule")

    def settings(self, parameters: Mapping[str, Parameter], toward: Mapping[str, Target | None]) -> dict[str, Setting]:
        """Returns the setting of each parameter, by canonical name.

        ``toward`` has an entry for each vector to which no rule gives a target.

        Raises:
            ValueError: a rule that matches nothing, a vector that shrinks toward nothing, or a law that a parameter cannot have.
        """
        for i, rule in enumerate(self.rules):
            if not any(matches(rule.match, name, parameter) for name, parameter in parameters.items()):
                example = next(iter(parameters))
                checks.fail(f"rules[{i}].match", repr(rule.match), f"one that matches a parameter, such as {example!r}")
            check_layers(f"rules[{i}].match", rule.match, parameters)
        return {name: self._setting(name, parameter, toward.get(name)) for name, parameter in parameters.items()}

    def _setting(self, name: str, parameter: Parameter, target: Target | None) -> Setting:
        alpha, beta, law, std = self.alpha, self.beta, self.law, self.std
        vector = parameter.role == "vectors"
        if vector:
            law = None
        for rule in self.rules:
            if matches(rule.match, name, parameter):
                alpha = alpha if rule.alpha is None else rule.alpha
                beta = beta if rule.beta is None else rule.beta
                law = law if rule.law is None else rule.law
                std = std if rule.std is None else rule.std
                target = target if rule.toward is None else rule.toward
                if rule.toward is not None and not vector:
                    checks.fail(
                        "toward", f"{rule.toward} for {name}", "a rule that matches vectors alone; the others shrink toward 0"
                    )
        keep = 1.0 - alpha
        if law is None:
            if not alpha:
                return Setting("constant", keep, 0.0)
            if target is None:
                checks.fail("toward", f"no value for {name}", "an entry for it, or a rule that gives one or has alpha=0")
            if isinstance(target, torch.Tensor):
                return Setting("elements", keep, alpha, target)
            return Setting("constant", keep, alpha * target)
        if law == "normal" and std is None:
            checks.fail("std", f"None for {name}", "a number >= 0 with law='normal'")
        if vector and (law != "normal" or isinstance(target, torch.Tensor) or target):
            got = f"{law} and toward={f'{target:g}' if isinstance(target, float) else target} for {name}"
            checks.fail("law", got, "normal and toward=0 for a vector with noise: Xavier's fans need a matrix")
        scale = alpha * beta * amplitude(law, parameter.matrix or parameter.shape, std, stacked=parameter.stacked)
        return Setting("uniform" if law == "xavier_uniform" else "normal", keep, scale)


def describe(tensors: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, Parameter]]:
    """Returns the tensors by canonical name, with the properties that decide their noise; each storage once, under its first name.

    A module yields the parameters that require a gradient. Their dimensions beyond two are a receptive field in a convolution, and count
    matrices elsewhere. In a mapping such dimensions are a receptive field, as in ``torch.nn.init``, and no tensor is an embedding.

    Raises:
        ValueError: no tensors, two different ones of the same canonical name, or memory that is shared in part (see
            :func:`undo_kernels.ops.layout.check_apart`).
    """
    convolutions, embeddings = set(), set()
    if isinstance(tensors, nn.Module):
        pairs = [(name, p) for name, p in tensors.named_parameters(remove_duplicate=False) if p.requires_grad]
        for module in tensors.modules():
            held = {id(p) for p in module.parameters(recurse=False)}
            if isinstance(module, nn.Embedding):
                embeddings |= held
            if isinstance(module, nn.modules.conv._ConvNd):
                convolutions |= held
    elif isinstance(tensors, Mapping):
        pairs = list(tensors.items())
        convolutions = {id(tensor) for tensor in tensors.values()}
    else:
        checks.fail("tensors", type(tensors).__name__, "a module or a mapping of names to tensors")
    found: dict[str, tuple[torch.Tensor, Parameter]] = {}
    seen: set[object] = set()
    for name, tensor in pairs:
        checks.text("tensors", name, "names that are strings of UTF-8")
        checks.dense(f"tensors[{name!r}]", tensor, "of floats")
        if (storage := _identity(tensor)) in seen:
            continue
        seen.add(storage)
        short = canonical_name(name)
        if short in found:
            checks.fail("tensors", f"two tensors named {short!r}", "different names once wrappers' prefixes are stripped")
        role = "vectors" if tensor.ndim < 2 else "embeddings" if id(tensor) in embeddings else "matrices"
        stacked = tensor.ndim > 2 and id(tensor) not in convolutions
        found[short] = (tensor, Parameter(tuple(tensor.shape), role, stacked))
    if not found:
        checks.fail("tensors", "none to noise", "at least one parameter that requires a gradient, as requires_grad_() sets it")
    others = {
        name: p for name, p in _parameters(tensors).items() if _identity(p) not in seen
    }  # a frozen parameter may share memory with a trained one
    check_apart("tensors", {**others, **{name: tensor for name, (tensor, _) in found.items()}}, found.keys())
    return found


def targets(toward: Toward, found: Mapping[str, tuple[torch.Tensor, Parameter]]) -> dict[str, Target]:
    """Returns what each vector shrinks toward, as far as ``toward`` says."""
    result = {}
    for name, (tensor, parameter) in found.items():
        if parameter.role == "vectors" and not (isinstance(toward, Mapping) and name not in toward):
            value = toward(name, tensor) if callable(toward) else toward[name] if isinstance(toward, Mapping) else toward
            if isinstance(value, torch.Tensor):
                checks.dense("toward", value, f"of finite floats {tuple(tensor.shape)}")
                if value.dtype not in checks.FLOATS or value.shape != tensor.shape or not value.isfinite().all():
                    got = f"{value.dtype}, shape {tuple(value.shape)} for {name}"
                    checks.fail("toward", got, f"a number, or a tensor of finite floats {tuple(tensor.shape)}")
                result[name] = value
            else:
                result[name] = checks.number("toward", value, f"a finite number for {name}")
    return result


def canonical_name(name: str) -> str:
    """Returns a parameter's name without the prefixes of wrappers (compile, data parallel, PEFT)."""
    while True:
        stripped = name.replace("._orig_mod.", ".").replace(".base_layer.", ".")
        for prefix in _WRAPPERS:
            stripped = stripped.removeprefix(prefix)
        if stripped == name:
            return name
        name = stripped


def matches(match: str, name: str, parameter: Parameter) -> bool:
    """Returns whether the ``match`` of a :class:`NoiseRule` applies to the parameter with this canonical name."""
    if match.startswith(_NOT):
        return not matches(match.removeprefix(_NOT), name, parameter)
    if match in ROLES:
        return parameter.role == match
    if match == HEAD and parameter.head:
        return True
    numbers = layers_of(match)
    return fnmatchcase(name, match) if numbers is None else layer_of(name) in numbers


def layers_of(match: str) -> frozenset[int] | None:
    """Returns the numbers in ``layers:0-3,7``; None if ``match`` has another form.

    Raises:
        ValueError: no such list of numbers.
    """
    form = match.removeprefix(_NOT)
    if not form.startswith("layers:"):
        return None
    numbers: set[int] = set()
    for part in form.removeprefix("layers:").split(","):
        found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part.strip())  # no model has more, and memory holds each number
        if found is None or int(found[2] or found[1]) < int(found[1]):
            checks.fail("match", checks.shown(match), "numbers below 10000 and rising ranges such as layers:0-3,7")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(numbers)


def layer_of(name: str) -> int | None:
    """Returns the number of a parameter's layer, which is the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def outside(layers: str) -> NoiseRule:
    """Returns the rule that leaves all parameters outside the layers ``0-3,7`` unchanged."""
    return NoiseRule(f"{_NOT}layers:{layers}", alpha=0.0)


def check_layers(argument: str, match: str, parameters: Iterable[str]) -> None:
    """Raises a ``ValueError`` if ``match`` names layers that the model does not have."""
    known = {layer_of(name) for name in parameters}
    if missing := sorted((layers_of(match) or frozenset()) - known):
        last = max((number for number in known if number is not None), default="none")
        checks.fail(argument, f"{match!r} with layer {missing[0]}", f"layers that there are; the last is {last}")


def _parameters(tensors: nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(tensors.named_parameters()) if isinstance(tensors, nn.Module) else {}


def _identity(tensor: torch.Tensor) -> object:
    """Returns a key that is equal for tied tensors; meta tensors, which have no storage, are told apart as objects."""
    local = local_of(tensor)
    return (local.data_ptr(), tuple(tensor.shape)) if local.device.type != "meta" and local.numel() else id(tensor)


def _strengths(alpha: float | None, beta: float | None) -> None:
    if alpha is not None:
        checks.number("alpha", alpha, "a number in [0, 1]", 0, 1)
    if beta is not None:
        checks.number("beta", beta, "a number >= 0", 0)
