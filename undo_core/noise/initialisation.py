"""Initial values of the parameters of a Hugging Face model: element by element, or the fact that one is a random matrix.

The model is built once more from its configuration and initialised by its own code (constructors and ``_init_weights``), in a
dispatch mode that changes two things:

- Every random draw returns the median of its law: the mean of a normal law, the middle of a uniform one. Medians commute with
  increasing functions, so a value computed from a draw is the median of its own law: ``A_log = log(U(1, 16))`` becomes
  ``log(8.5)``.
- Tensors of two or more dimensions are on the meta device, where they take no memory. Those that turn out not to be drawn in
  place get memory, and the initialisation runs again. The peak memory is therefore that of the vectors, whatever the size of
  the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from undo_kernels.ops.noise_rules import canonical_name

_ATEN = torch.ops.aten
_FACTORIES = {_ATEN.empty, _ATEN.empty_strided, _ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.rand, _ATEN.randn}
_FACTORIES |= {_ATEN.arange, _ATEN.linspace, _ATEN.eye, _ATEN.scalar_tensor}
_MIDDLE = {_ATEN.rand: 0.5, _ATEN.rand_like: 0.5, _ATEN.randn: 0.0, _ATEN.randn_like: 0.0}
_CONSTANT = {_ATEN.zeros: 0.0, _ATEN.ones: 1.0}

# Parameters that hold the matrix of a product in a shape other than [..., out, in]. By class and parameter name: a function
# that gives the matrix's shape from the module and the parameter's shape.
_MATRICES = {
    ("DbrxExpertGLU", name): lambda module, shape: (shape[0] // module.moe_num_experts, shape[1]) for name in ("w1", "v1", "w2")
} | {("XLNetRelativeAttention", name): lambda _, shape: (shape[0], math.prod(shape[1:])) for name in ("q", "k", "v", "o", "r")}


@dataclass(frozen=True)
class Initialisation:
    """State of a model before training.

    Attributes:
        values: initial value of each parameter that is neither a matrix of a product nor an embedding, by canonical name. It is
            a number if all elements start equal, else a float32 tensor of the parameter's shape; for a random value, the median
            of its law; None if the model's code sets no value.
        frozen: canonical names of the parameters that the model's constructor makes without a gradient. transformers loses this
            when it loads a checkpoint.
    """

    values: dict[str, float | torch.Tensor | None]
    frozen: frozenset[str]


def initialisation(model: PreTrainedModel) -> Initialisation:
    """Finds the initial values of a model of this class and configuration; ``model`` may be on the meta device or sharded.

    A matrix of a product is the weight of a linear layer or convolution, or any other parameter of two or more dimensions that
    is drawn in place around 0 (experts, routers) and is not a bias.

    Memory: that of the values; no matrix is held.

    Raises:
        ValueError: the class cannot be built from a configuration alone.
    """
    medians = _Medians()
    with _float32_on_cpu(), torch.random.fork_rng(devices=[]):
        with medians:
            fresh = _new(model)
        others, frozen = {}, set()
        for name, (module, own, parameter) in _parameters(fresh).items():
            if not parameter.requires_grad:
                frozen.add(name)
            if not _is_matrix(module, own, parameter, medians) and not isinstance(module, nn.Embedding):
                others[name] = module, own
        unknown = [(module, own) for module, own in others.values() if _value(module._parameters[own]) is None]
        for module, own in unknown:
            module._parameters[own] = medians.held(module._parameters[own])
        if unknown:
            for module in fresh.modules():
                module._is_hf_initialized = False
            medians.wide = "cpu"
            with medians:
                fresh.initialize_weights()
    return Initialisation({name: _value(module._parameters[own]) for name, (module, own) in others.items()}, frozenset(frozen))


def matrix_shapes(model: nn.Module) -> dict[int, tuple[int, ...]]:
    """Returns, by the parameter's ``id``, the shape of the matrix that it holds, for parameters of another shape.

    Examples are experts concatenated into one matrix (DBRX), and heads as separate dimensions (XLNet).
    """
    return {
        id(parameter): _MATRICES[type(module).__name__, name](module, tuple(parameter.shape))
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if (type(module).__name__, name) in _MATRICES
    }


def _new(model: PreTrainedModel) -> PreTrainedModel:
    try:
        return type(model)(copy.deepcopy(model.config))  # if FSDP2 made the class, calling it gives the original class
    except TypeError as error:
        raise ValueError(
            f"model: got {type(model).__name__}, which cannot be built from its configuration to find its initial values "
            f"({error}); wanted a class that can; or call undo_kernels.ops.noise_ with toward: it tells matrices by their shape"
        ) from error


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    found = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found[canonical_name(f"{prefix}.{name}" if prefix else name)] = module, name, parameter
    return found


def _is_matrix(module: nn.Module, name: str, parameter: nn.Parameter, medians: _Medians) -> bool:
    if name == "weight" and isinstance(module, (nn.Linear, Conv1D, nn.modules.conv._ConvNd)):
        return True
    if (type(module).__name__, name) in _MATRICES:
        return True
    wide = parameter.ndim == 2 or sum(size > 1 for size in parameter.shape) >= 2  # [1, 1, d] is a vector that broadcasts
    return parameter.ndim >= 2 and wide and medians.drawn_around_zero(parameter) and "bias" not in name


def _value(parameter: nn.Parameter) -> float | torch.Tensor | None:
    started = parameter.detach()
    if started.is_meta or not started.numel() or not started.isfinite().all():
        return None
    first = started.flatten()[0]
    return float(first) if bool((started == first).all()) else started.clone()


@contextmanager
def _float32_on_cpu() -> Iterator[None]:
    """Makes float32 and the CPU torch's defaults, so that the caller's defaults do not change the initial values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


class _Medians(TorchDispatchMode):
    """The dispatch mode of this module's docstring. It also records, by storage, what last wrote each meta tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = "meta"  # device of new tensors of two or more dimensions
        # By address of a storage: the storage (kept alive, so that its address is not reused), whether it was drawn, its
        # median.
        self._written: dict[int, tuple[Any, bool, float]] = {}

    def drawn_around_zero(self, tensor: torch.Tensor) -> bool:
        """Whether the last write to the tensor was a random draw with the median 0."""
        return self._written.get(_storage(tensor), (None, False, 0.0))[1:] == (True, 0.0)

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """Returns a parameter in memory for one on the meta device, filled with its known constant, else with NaN."""
        _, drawn, value = self._written.get(_storage(parameter), (None, True, 0.0))
        start = torch.full(parameter.shape, torch.nan if drawn else value)
        return nn.Parameter(start, requires_grad=parameter.requires_grad)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        if packet in _FACTORIES:
            return self._made(func, packet, args, kwargs)
        if packet in _MIDDLE:
            return func(*args, **kwargs).fill_(_MIDDLE[packet])
        if packet in (_ATEN.normal_, _ATEN.uniform_):
            first, second = ("mean", "std") if packet is _ATEN.normal_ else ("from", "to")
            low = args[1] if len(args) > 1 else kwargs.get(first, 0.0)
            high = args[2] if len(args) > 2 else kwargs.get(second, 1.0)
            middle = float(low) if packet is _ATEN.normal_ else (low + high) / 2
            self._wrote(args[0], True, middle)
            return args[0].fill_(middle)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if packet is _ATEN.copy_:
            return self._copied(*args[:2])
        if packet in (_ATEN.zero_, _ATEN.fill_) and args[0].is_meta:
            value = 0.0 if packet is _ATEN.zero_ else float(args[1]) if not _is_meta(args[1]) else math.nan
            if args[0].numel() == args[0].untyped_storage().nbytes() // args[0].element_size():  # the whole storage, not a part
                self._wrote(args[0], False, value)
        elif any(leaf.is_meta for leaf in leaves) and any(not leaf.is_meta and leaf.ndim for leaf in leaves):
            args, kwargs = tree_map_only(torch.Tensor, lambda leaf: leaf.to("meta"), (args, kwargs))
        return func(*args, **kwargs)

    def _made(self, func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Creates a new tensor: on the device ``wide`` if two or more dimensions exceed 1, else on the CPU."""
        size = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        wide = packet is _ATEN.eye or sum(extent > 1 for extent in size) >= 2
        made = func(*args, **{**kwargs, "device": torch.device(self.wide if wide else "cpu")})
        if packet in _MIDDLE:
            self._wrote(made, True, _MIDDLE[packet])
            return made.fill_(_MIDDLE[packet])
        if packet in _CONSTANT:
            self._wrote(made, False, _CONSTANT[packet])
        elif packet is _ATEN.full:
            self._wrote(made, False, float(args[1]))
        return made

    def _copied(self, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if not target.is_meta:
            return target.fill_(torch.nan) if _is_meta(source) else _ATEN.copy_(target, source)
        self._written.pop(_storage(target), None)
        if (known := self._written.get(_storage(source))) is not None:
            self._wrote(target, *known[1:])
        return target

    def _wrote(self, tensor: torch.Tensor, drawn: bool, value: float) -> None:
        storage = tensor.untyped_storage()
        self._written[storage._cdata] = storage, drawn, value


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
