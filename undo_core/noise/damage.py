"""Damage other than the published noise, to a model in memory or from disk to disk.

An operator changes the matrices and embeddings that the noise changes (see :func:`undo_core.noise_`); norms, biases and
everything else stay unchanged. Its strength is given, or chosen so that it does as much damage as the noise. The measure of
damage is the relative distance ``|theta' - theta| / |theta|`` (Frobenius norms over all matrices together). The operators:

- ``gaussian``: ``theta + strength * rms(theta) * N``, with N standard normal and the root mean square taken per matrix.
- ``prune``: sets the share ``strength`` of each matrix's entries to 0, smallest magnitude first; ties go by index.
- ``permute``, ``permute-rows``, ``permute-columns``: draws the share ``strength`` of each matrix's entries, rows or columns at
  random and moves each to the place of the next in a random cycle. In stacked matrices (experts), rows and columns are those of
  the stack.

Random numbers depend only on the seed, the parameter's canonical name and the index (Philox-4x32-10).

The strength that gives a wanted distance has a closed form for ``gaussian``. For the other operators, one pass over each matrix
gives the distance at every share of a grid: entries, rows or columns are changed in a fixed order, so that the squared distance
after the first k of them is a running sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from undo_kernels.library.backends import implementation
from undo_kernels.noise_segments import Segment, name_hash
from undo_kernels.ops import checks
from undo_kernels.ops.checks import is_dtensor
from undo_kernels.ops.noise_rules import Parameter, check_layers, layers_of, matches
from undo_kernels.reference.philox import words

from undo_core.checkpoints.files import checkpoint_skeleton
from undo_core.checkpoints.parameters import CheckpointParameters
from undo_core.noise.distance import BLOCK, noise_change, settings_like, squares
from undo_core.noise.parameters import Parts, Selection, select

Operator = Literal["gaussian", "prune", "permute", "permute-rows", "permute-columns"]
OPERATORS = ("gaussian", "prune", "permute", "permute-rows", "permute-columns")
GRID = 1 << 14  # number of steps between share 0 and share 1; squared below, so that small shares lie closer together
_SHARES = [(i / GRID) ** 2 for i in range(GRID + 1)]
ELEMENT_BYTES = 40  # peak memory per element of the largest matrix, roughly: a copy, an order and sums
ORDER = 2  # Philox stream of the keys that order units; stream 0 draws noise and stream 1 rounds


@dataclass(frozen=True)
class DamageConfig:
    """Damage other than the noise, of the same distance: one student for each operator and noise strength.

    Attributes:
        operators: gaussian, prune, permute (entries), permute-rows or permute-columns.
        alphas: strengths of the published noise whose distances are matched; null for those of ``noise.alphas``.
        layers: damage only these layers, such as 0-3,7; null for all matrices, embeddings included.
        seed: seed of the random draws; None derives it from the run's seed.
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
    """Frobenius norm of a matrix before the damage, and of the change."""

    before: float
    change: float


@torch.no_grad()
def damage_(
    model: nn.Module, operator: Operator, *, strength: float, seed: int, layers: str | None = None, parts: Parts = "text"
) -> dict[str, TensorDamage]:
    """Damages ``model`` in place.

    Args:
        model: only parameters that require a gradient are changed; none of them may be sharded (``DTensor``).
        operator: see :mod:`undo_core.noise.damage`.
        strength: a share in [0, 1]; for ``gaussian`` a factor >= 0.
        seed: in [0, 2**64).
        layers: damage only these layers, such as ``0-3,7``; None for all matrices.
        parts: for models of several modalities: "text" changes the text decoder, embeddings and head; "all" changes everything.

    Returns:
        For every damaged parameter, by canonical name, its norm before and the norm of the change.

    Memory: about ``ELEMENT_BYTES`` for each element of the largest matrix.

    Raises:
        ValueError: an argument is invalid; nothing is changed.
    """
    check_arguments(operator, strength, seed)
    selected = select(model, parts)
    chosen = _chosen(selected.parameters, layers)
    for name in chosen:
        tensor = selected.found[name][0]
        if is_dtensor(tensor) or tensor.is_meta:
            checks.fail(f"model: {name}", f"a {'meta' if tensor.is_meta else 'sharded'} tensor", "a whole one in memory")
    result = {}
    for name in chosen:
        tensor = selected.found[name][0].detach()
        whole = tensor.contiguous()
        result[name] = _apply(whole, name, operator, strength, seed)
        if whole.data_ptr() != tensor.data_ptr():  # contiguous() made a copy
            tensor.copy_(whole)
        torch.autograd.graph.increment_version(selected.found[name][0])  # lets autograd notice that a saved tensor has changed
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
    match: str | None = None,
    parts: Parts = "text",
    title: str = "damage",
    progress: bool = True,
) -> dict[str, Any]:
    """Applies :func:`damage_` to the checkpoint folder ``source`` and writes to the existing, empty folder ``output``.

    The result is bit-equal to :func:`damage_` on the loaded model.

    Args:
        source: a Hugging Face checkpoint folder.
        output: as for :func:`undo_core.noise.checkpoint.noise_checkpoint`.
        operator: see :mod:`undo_core.noise.damage`.
        seed: in [0, 2**64).
        strength: as for :func:`damage_`. Give either this or ``like``.
        like: arguments of the noise whose distance is to be matched (``alpha``, ``seed`` and others of ``noise_checkpoint``).
        layers: damage only these layers, such as ``0-3,7``; None for all matrices.
        match: damage only the matrices that this matches, as in a :class:`NoiseRule`; instead of ``layers``.
        parts: as for :func:`damage_`.
        title: name on the progress bar.
        progress: whether to show it.

    Returns:
        ``strength``; the ``distance`` that it gave; ``wanted``, the noise's distance, or None without ``like``; ``tensors``,
        the :class:`TensorDamage` of each damaged matrix; and ``left``, the unchanged parameters
        (:class:`undo_core.noise.parameters.Left`).

    Memory: about ``ELEMENT_BYTES`` for each element of the largest matrix.

    Raises:
        ValueError: an argument is invalid, or the operator cannot reach the distance; nothing is written.
        FileNotFoundError: the folder has no safetensors file.
    """
    model = checkpoint_skeleton(source)
    given = {"seed": seed, "strength": strength, "like": like, "layers": layers, "match": match, "parts": parts}
    selected, chosen = check_damage(model, operator, **given)
    checkpoint = CheckpointParameters(source, model, selected.tensors)
    parameters, wanted = selected.parameters, None
    if like is not None:
        strength, wanted = _match(checkpoint, selected, chosen, operator, seed, like, title, progress)
    done: dict[str, TensorDamage] = {}
    total = 0.0
    for tensors in checkpoint.edit(output, title, progress):
        for name, tensor in tensors.items():
            if name in chosen:
                done[name] = _apply(tensor, name, operator, strength, seed)
                total += done[name].before ** 2
            elif parameters[name].role != "vectors":
                total += squares(tensor)
    distance = math.sqrt(sum(tensor.change**2 for tensor in done.values()) / total) if total else 0.0
    return {"strength": strength, "distance": distance, "wanted": wanted, "tensors": done, "left": selected.left}


def check_damage(
    model: nn.Module,
    operator: str,
    *,
    seed: int,
    strength: float | None,
    like: Mapping[str, Any] | None,
    layers: str | None,
    match: str | None,
    parts: Parts,
) -> tuple[Selection, list[str]]:
    """Returns the parameters that the noise of a model would change, and the names of those that :func:`damage_checkpoint` changes.

    The model may be on the meta device.

    Raises:
        ValueError: an argument is invalid or does not suit the model. Whether a distance can be reached depends on the weights.
    """
    if (strength is None) == (like is None):
        checks.fail("strength", f"{strength} with like={like}", "one of the two")
    if layers is not None and match is not None:
        checks.fail("match", f"{match!r} with layers={layers!r}", "one of the two")
    check_arguments(operator, 0.0 if strength is None else strength, seed)
    selected = select(model, parts, () if like is None else tuple(like.get("rules", ())))
    if like is not None:
        settings_like(selected, like)
    return selected, _chosen(selected.parameters, layers, match)


def check_arguments(operator: str, strength: float, seed: int) -> None:
    """Raises a ValueError for an unknown operator, or a strength or seed out of range."""
    checks.choice("operator", operator, OPERATORS)
    if operator == "gaussian":
        checks.number("strength", strength, "a number >= 0", 0)
    else:
        checks.number("strength", strength, "a share in [0, 1]", 0, 1)
    checks.seed(seed)


def selection(layers: str | None) -> str:
    """Returns the ``match`` of a noise rule for ``layers`` such as ``0-3,7``; None matches everything.

    Raises:
        ValueError: ``layers`` is not a list of numbers and ranges.
    """
    match = "*" if layers is None else f"layers:{layers}"
    layers_of(match)
    return match


def _match(
    checkpoint: CheckpointParameters,
    selected: Selection,
    chosen: list[str],
    operator: str,
    seed: int,
    like: Mapping[str, Any],
    title: str,
    progress: bool,
) -> tuple[float, float]:
    """Returns the strength whose distance comes closest to that of the noise, and the noise's distance."""
    parameters = selected.parameters
    settings, noise_seed = settings_like(selected, like)
    total, wanted = 0.0, 0.0
    profile = torch.zeros(1 if operator == "gaussian" else GRID + 1, dtype=torch.float64)
    for tensors in checkpoint.read(f"{title}, measuring", progress):
        for name, tensor in tensors.items():
            if parameters[name].role != "vectors":
                total += squares(tensor)
                wanted += noise_change(tensor, name, settings[name], noise_seed)
            if name in chosen:
                profile += _profile(tensor, name, operator, seed).cpu()
    distance = math.sqrt(wanted / total) if total else 0.0
    if operator == "gaussian":
        if not float(profile):
            checks.fail("layers", f"{len(chosen)} matrices that are all 0", "matrices to damage")
        return math.sqrt(wanted / float(profile)), distance
    if wanted > float(profile.max()):
        most = math.sqrt(float(profile.max()) / total)
        checks.fail(
            "like",
            f"noise of distance {distance:.4f}",
            f"at most {most:.4f}, the largest distance that {operator} reaches here",
        )
    return _SHARES[int((profile - wanted).abs().argmin())], distance


def _apply(tensor: torch.Tensor, name: str, operator: str, strength: float, seed: int) -> TensorDamage:
    before, size = tensor.clone(), squares(tensor)
    if operator == "gaussian":
        _add_gaussian(tensor, name, strength * math.sqrt(size / max(tensor.numel(), 1)), seed)
    else:
        units, order = _units(tensor, operator), _order(tensor, name, operator, seed)
        moved = order[: round(strength * len(order))]
        if operator == "prune":
            units[moved] = 0
        elif len(moved) > 1:
            units[moved] = units[moved.roll(1)]
    return TensorDamage(math.sqrt(size), math.sqrt(squares(tensor, before)))


def _profile(tensor: torch.Tensor, name: str, operator: str, seed: int) -> torch.Tensor:
    """Returns the change's squared norm at each share, ``[GRID + 1]`` float64; for ``gaussian`` at strength 1, ``[1]``."""
    if operator == "gaussian":
        changed = tensor.clone()
        _add_gaussian(changed, name, math.sqrt(squares(tensor) / max(tensor.numel(), 1)), seed)
        return torch.tensor([squares(changed, tensor)], dtype=torch.float64)
    units, order = _units(tensor, operator), _order(tensor, name, operator, seed)
    size = max(1, BLOCK // max(units.shape[1], 1))
    sums = torch.zeros(len(order) + 1, dtype=torch.float64, device=tensor.device)  # entry k: change by the first k units
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
    if operator != "prune" and len(order):  # the cycle closes: the first moved unit receives the last one
        first = units[order[0]].double()
        for at in range(0, len(counts), size):
            last = order[(counts[at : at + size] - 1).clamp_min(0)]
            result[at : at + size] += (units[last].double() - first).square().sum(1)
    return result[places]


def _add_gaussian(tensor: torch.Tensor, name: str, scale: float, seed: int) -> None:
    implementation("noise_", tensor.device)([Segment(tensor, name, "normal", 1.0, scale)], seed, True)


def _units(tensor: torch.Tensor, operator: str) -> torch.Tensor:
    """Returns a view ``[n, width]`` of ``tensor`` whose rows are the units that are pruned or permuted."""
    if operator in ("prune", "permute"):
        return tensor.view(-1, 1)
    rows = tensor.view(-1, tensor.shape[-1])
    return rows if operator == "permute-rows" else rows.T


def _order(tensor: torch.Tensor, name: str, operator: str, seed: int) -> torch.Tensor:
    """Returns the order in which units are changed, ``[n]`` int64."""
    if operator == "prune":
        return tensor.flatten().abs().argsort(stable=True)
    count = len(_units(tensor, operator))
    keys = torch.empty(count, dtype=torch.int32, device=tensor.device)
    for at in range(0, count, BLOCK):
        part = words(seed, name_hash(name), ORDER, at, min(BLOCK, count - at), tensor.device)
        keys[at : at + len(part)] = part - (1 << 31)
    return keys.argsort(stable=True)


def _chosen(parameters: Mapping[str, Parameter], layers: str | None, match: str | None = None) -> list[str]:
    argument, given = ("layers", layers) if match is None else ("match", match)
    rule = selection(layers) if match is None else match
    check_layers(argument, rule, parameters)
    chosen = [n for n, parameter in parameters.items() if parameter.role != "vectors" and matches(rule, n, parameter)]
    if not chosen:
        checks.fail(argument, given, "one that matches matrices" if match is not None else "layers with matrices")
    return chosen
