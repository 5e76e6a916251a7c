"""Other damage than the published noise, at a chosen strength or as much as the noise does: to a model, or from disk to disk.

An operator changes the matrices of products and the embeddings that the noise changes (:func:`undo_core.noise_` states which
parameters are matrices and which are left); norms, biases and all others stay as they are. How much is the relative distance
``|theta' - theta| / |theta|`` (Frobenius, over all matrices together):

- ``gaussian``: ``theta + strength * rms(theta) * N``, N standard normal, the root mean square of each matrix.
- ``prune``: the ``strength`` share of each matrix that is smallest in size becomes 0; equal ones in the order of their index.
- ``permute``, ``permute-rows``, ``permute-columns``: that share of each matrix's entries, rows or columns, drawn at random, move one
  place on in a random cycle: every one of them moves. Of stacked matrices (experts) the rows and columns are those of the stack.

What is drawn depends on the seed, the parameter's canonical name and the index alone (Philox-4x32-10).

The strength that gives a distance has a closed form for ``gaussian``. For the others the distance at every share on a grid follows
from one pass over each matrix: units are changed in a fixed order, so that the squared distance of the first k is a running sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from undo_kernels.library import implementation
from undo_kernels.ops import checks
from undo_kernels.ops.noise import segment
from undo_kernels.ops.noise_rules import Parameter, Policy, Setting, check_layers, layers_of, matches
from undo_kernels.ops.sharding import is_sharded
from undo_kernels.reference.philox import words
from undo_kernels.segment import Segment, name_hash

from undo_core.checkpoint_edit import CheckpointParameters
from undo_core.parameters import Parts, select

Operator = Literal["gaussian", "prune", "permute", "permute-rows", "permute-columns"]
OPERATORS = ("gaussian", "prune", "permute", "permute-rows", "permute-columns")
GRID = 1 << 14  # shares at which distances are known, closer to each other where they are small
_SHARES = [(i / GRID) ** 2 for i in range(GRID + 1)]
BLOCK = 1 << 20  # elements at a time
ELEMENT_BYTES = 40  # of the largest matrix, for each element, about: a copy, an order, sums
ORDER = 2  # Philox's stream of the keys that order units; 0 draws noise and 1 rounds


@dataclass(frozen=True)
class DamageConfig:
    """Copies that are damaged otherwise, as much as by the noise: a student for each operator and strength of the noise.

    Attributes:
        operators: gaussian, prune, permute (entries), permute-rows or permute-columns.
        alphas: the distance is that of the published noise at these strengths; null for those of ``noise.alphas``.
        layers: only these layers are damaged, such as 0-3,7; null for all matrices, embeddings included.
        seed: of what is drawn; None derives it from the run's seed.
    """

    operators: list[Operator] = field(default_factory=list)
    alphas: list[float] | None = None
    layers: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for operator in self.operators:
            checks.choice("damage.operators", operator, OPERATORS)
        if len(set(self.operators)) < len(self.operators):
            checks.fail("damage.operators", self.operators, "different ones")
        alphas = [] if self.alphas is None else self.alphas
        if any(not 0 < alpha <= 1 for alpha in alphas) or len(set(alphas)) < len(alphas):
            checks.fail("damage.alphas", alphas, "different numbers in (0, 1]")
        selection(self.layers)


@dataclass(frozen=True)
class TensorDamage:
    """What happened to a matrix: its Frobenius norm before, and that of the change."""

    before: float
    change: float


@torch.no_grad()
def damage_(
    model: nn.Module, operator: Operator, *, strength: float, seed: int, layers: str | None = None, parts: Parts = "text"
) -> dict[str, TensorDamage]:
    """Damage ``model`` in place.

    Args:
        model: its parameters that require a gradient; no ``DTensor``.
        operator: see :mod:`undo_core.damage`.
        strength: a share in [0, 1]; for ``gaussian`` a factor >= 0.
        seed: in [0, 2**64).
        layers: only these, such as ``0-3,7``.
        parts: of a model of text and other modalities: "text", its decoder, embeddings and head; or "all".

    Returns:
        For every damaged parameter, by canonical name, its norm and that of the change.

    Memory: about ``ELEMENT_BYTES`` for each element of the largest matrix.

    Raises:
        ValueError: a bad argument; nothing is changed.
    """
    check_arguments(operator, strength, seed)
    selected = select(model, parts)
    chosen = _chosen(selected.parameters, layers)
    for name in chosen:
        tensor = selected.found[name][0]
        if is_sharded(tensor) or tensor.is_meta:
            checks.fail(f"model: {name}", f"a {'meta' if tensor.is_meta else 'sharded'} tensor", "a whole one in memory")
    result = {}
    for name in chosen:
        tensor = selected.found[name][0].detach()
        whole = tensor.contiguous()
        result[name] = _apply(whole, name, operator, strength, seed)
        if whole.data_ptr() != tensor.data_ptr():  # a copy of a parameter that is not contiguous
            tensor.copy_(whole)
        torch.autograd.graph.increment_version(selected.found[name][0])  # a graph that has saved it must notice
    return result


@torch.no_grad()
def damage_checkpoint(
    source: Path,
    output: Path,
    operator: Operator,
    *,
    seed: int,
    strength: float | None = None,
    like: Mapping[str, Any] | None = None,
    layers: str | None = None,
    parts: Parts = "text",
    title: str = "damage",
    progress: bool = True,
) -> dict[str, Any]:
    """:func:`damage_` on the checkpoint folder ``source``, written to the existing, empty folder ``output``, with the same bits.

    Args:
        source: a Hugging Face checkpoint folder.
        output: as for :func:`undo_core.noise_checkpoint.noise_checkpoint`.
        operator: see :mod:`undo_core.damage`.
        seed: in [0, 2**64).
        strength: as for :func:`damage_`; or
        like: arguments of the noise (``alpha``, ``seed`` and others of ``noise_checkpoint``) whose distance is wanted.
        layers: only these, such as ``0-3,7``.
        parts: as for :func:`damage_`.
        title: name on the progress bar.
        progress: show it.

    Returns:
        ``strength``, the ``distance`` that it gave, ``wanted`` (of the noise, or None), each matrix's :class:`TensorDamage` and what is
        ``left`` (see :class:`undo_core.parameters.Left`).

    Memory: about ``ELEMENT_BYTES`` for each element of the largest matrix.

    Raises:
        ValueError: a bad argument, or a distance that the operator does not reach; nothing is written.
        FileNotFoundError: no safetensors file.
    """
    if (strength is None) == (like is None):
        checks.fail("strength", f"{strength} with like={like}", "one of the two")
    check_arguments(operator, 0.0 if strength is None else strength, seed)
    checkpoint = CheckpointParameters(source, parts, () if like is None else tuple(like.get("rules", ())))
    chosen, wanted = _chosen(checkpoint.parameters, layers), None
    if like is not None:
        strength, wanted = _match(checkpoint, chosen, operator, seed, dict(like), title, progress)
    done: dict[str, TensorDamage] = {}
    total = 0.0
    for parameters in checkpoint.edit(output, title, progress):
        for name, tensor in parameters.items():
            if name in chosen:
                done[name] = _apply(tensor, name, operator, strength, seed)
                total += done[name].before ** 2
            elif checkpoint.parameters[name].role != "vectors":
                total += _squares(tensor)
    distance = math.sqrt(sum(tensor.change**2 for tensor in done.values()) / total) if total else 0.0
    return {"strength": strength, "distance": distance, "wanted": wanted, "tensors": done, "left": checkpoint.chosen.left}


def check_arguments(operator: str, strength: float, seed: int) -> None:
    """Raise a ValueError for an unknown operator, a strength that it cannot have, or a seed that is none."""
    checks.choice("operator", operator, OPERATORS)
    if operator == "gaussian":
        checks.number("strength", strength, "a number >= 0", 0)
    else:
        checks.number("strength", strength, "a share in [0, 1]", 0, 1)
    checks.seed(seed)


def selection(layers: str | None) -> str:
    """``0-3,7`` as a rule's ``match``.

    Raises:
        ValueError: no list of numbers and ranges.
    """
    match = "*" if layers is None else f"layers:{layers}"
    layers_of(match)
    return match


def _match(
    checkpoint: CheckpointParameters,
    chosen: list[str],
    operator: str,
    seed: int,
    like: dict[str, Any],
    title: str,
    progress: bool,
) -> tuple[float, float]:
    """The strength whose distance comes closest to that of the noise, and the noise's distance."""
    noise_seed = like.pop("seed")
    checks.seed(noise_seed)
    policy = Policy(**{"beta": 0.1, **like, "rules": checkpoint.chosen.rules})
    settings = policy.settings(checkpoint.parameters, checkpoint.chosen.toward)
    total, wanted = 0.0, 0.0
    profile = torch.zeros(1 if operator == "gaussian" else GRID + 1, dtype=torch.float64)
    for parameters in checkpoint.read(f"{title}, measuring", progress):
        for name, tensor in parameters.items():
            if checkpoint.parameters[name].role != "vectors":
                total += _squares(tensor)
                wanted += _noise_change(tensor, name, settings[name], noise_seed)
            if name in chosen:
                profile += _profile(tensor, name, operator, seed).cpu()
    distance = math.sqrt(wanted / total) if total else 0.0
    if operator == "gaussian":
        if not float(profile):
            checks.fail("layers", f"{len(chosen)} matrices that are all 0", "matrices to damage")
        return math.sqrt(wanted / float(profile)), distance
    if wanted > float(profile.max()):
        most = math.sqrt(float(profile.max()) / total)
        checks.fail("like", f"noise of distance {distance:.4f}", f"at most {most:.4f}, which is what {operator} can do here")
    return _SHARES[int((profile - wanted).abs().argmin())], distance


def _noise_change(tensor: torch.Tensor, name: str, setting: Setting, seed: int) -> float:
    """Squared norm of what the published noise would change."""
    noised = tensor.clone()
    implementation("noise_", noised.device)([segment(name, noised, setting)], seed, True)
    return _squares(noised, tensor)


def _apply(tensor: torch.Tensor, name: str, operator: str, strength: float, seed: int) -> TensorDamage:
    before, squares = tensor.clone(), _squares(tensor)
    if operator == "gaussian":
        _add_gaussian(tensor, name, strength * math.sqrt(squares / max(tensor.numel(), 1)), seed)
    else:
        units, order = _units(tensor, operator), _order(tensor, name, operator, seed)
        moved = order[: round(strength * len(order))]
        if operator == "prune":
            units[moved] = 0
        elif len(moved) > 1:
            units[moved] = units[moved.roll(1)]
    return TensorDamage(math.sqrt(squares), math.sqrt(_squares(tensor, before)))


def _profile(tensor: torch.Tensor, name: str, operator: str, seed: int) -> torch.Tensor:
    """Squared norm of the change at each share of the grid, ``[GRID + 1]`` float64; for ``gaussian`` at strength 1, ``[1]``."""
    if operator == "gaussian":
        changed = tensor.clone()
        _add_gaussian(changed, name, math.sqrt(_squares(tensor) / max(tensor.numel(), 1)), seed)
        return torch.tensor([_squares(changed, tensor)], dtype=torch.float64)
    units, order = _units(tensor, operator), _order(tensor, name, operator, seed)
    size = max(1, BLOCK // max(units.shape[1], 1))
    sums = torch.zeros(len(order) + 1, dtype=torch.float64, device=tensor.device)  # of the change by the first k units
    for at in range(0, len(order), size):
        part = order[at : at + size]
        moved = units[part].double()
        if operator != "prune":
            moved -= units[order[(torch.arange(at, at + len(part), device=order.device) - 1).clamp_min(0)]].double()
        sums[at + 1 : at + 1 + len(part)] = moved.square().sum(1)
    sums = sums.cumsum(0)
    counts, places = torch.tensor([round(share * len(order)) for share in _SHARES], device=tensor.device).unique(
        return_inverse=True
    )
    result = sums[counts]
    if operator != "prune" and len(order):  # the first of them takes the last one's place
        first = units[order[0]].double()
        for at in range(0, len(counts), size):
            last = order[(counts[at : at + size] - 1).clamp_min(0)]
            result[at : at + size] += (units[last].double() - first).square().sum(1)
    return result[places]


def _add_gaussian(tensor: torch.Tensor, name: str, scale: float, seed: int) -> None:
    implementation("noise_", tensor.device)([Segment(tensor, name, "normal", 1.0, scale)], seed, True)


def _units(tensor: torch.Tensor, operator: str) -> torch.Tensor:
    """What is pruned or permuted, as the rows of a view ``[n, width]``."""
    if operator in ("prune", "permute"):
        return tensor.view(-1, 1)
    rows = tensor.view(-1, tensor.shape[-1])
    return rows if operator == "permute-rows" else rows.T


def _order(tensor: torch.Tensor, name: str, operator: str, seed: int) -> torch.Tensor:
    """The order in which units are changed, int64."""
    if operator == "prune":
        return tensor.flatten().abs().argsort(stable=True)
    count = len(_units(tensor, operator))
    keys = torch.empty(count, dtype=torch.int32, device=tensor.device)
    for at in range(0, count, BLOCK):
        part = words(seed, name_hash(name), ORDER, at, min(BLOCK, count - at), tensor.device)
        keys[at : at + len(part)] = part - (1 << 31)
    return keys.argsort(stable=True)


def _chosen(parameters: Mapping[str, Parameter], layers: str | None) -> list[str]:
    match = selection(layers)
    check_layers("layers", match, parameters)
    chosen = [n for n, parameter in parameters.items() if parameter.role != "vectors" and matches(match, n, parameter)]
    if not chosen:
        checks.fail("layers", layers, "layers with matrices")
    return chosen


def _squares(tensor: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """Sum of squares, of the difference where there is another tensor, in float64 and in blocks."""
    parts: Iterable[torch.Tensor] = tensor.flatten().split(BLOCK)
    if other is None:
        return math.fsum(float(part.double().square().sum()) for part in parts)
    pairs = zip(parts, other.flatten().split(BLOCK), strict=True)
    return math.fsum(float((a.double() - b.double()).square_().sum()) for a, b in pairs)
