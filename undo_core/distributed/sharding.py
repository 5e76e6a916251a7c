"""Models whose parameters are sharded over the ranks by FSDP2, and computations that need them whole.

Each element of the largest list of layers is a unit of its own, gathered before it computes and freed after it. All other
parameters (embedding, final norm and head, tied or not) are in the root unit, except where ranks share heads
(:func:`undo_core.distributed.arrange`): each of them then holds a part of the head and of an embedding tied to it, and these are a unit
that is sharded over, and gathered among, the ranks with the same part. The trunk and the loss must run inside *one* method
of the whole model that FSDP2 knows as a forward pass: only there the head is whole, and its gradient is reduced. :func:`run` does
that. A head that is read outside is a ``DTensor``, which :func:`undo_core.models.head_of` refuses.

FSDP2 divides gradients by the number of ranks; here it adds them. Every loss is divided by the number of labels of the whole batch,
so that the sum over the ranks is the gradient of one process.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from undo_kernels.ops.checks import is_dtensor
from undo_kernels.ops.sharding import local_of

from undo_core.distributed import ranks
from undo_core.distributed.vocabulary import divide
from undo_core.models import UnsupportedHead, head_of
from undo_core.models.adapters import bare

_METHOD, _UNITS, _SHARED = "_undo_forward", "_undo_units", "_undo_shared"


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was applied to ``model``."""
    return _METHOD in vars(bare(model))


def shard(model: nn.Module, compute: torch.dtype | None = None) -> None:
    """Shards the parameters of ``model`` over all ranks, in place; does nothing in a process that runs alone.

    Args:
        model: the same on every rank, on its device. Its parameter objects are replaced, and the old ones become empty, so that
            references to them do not keep the whole model in memory.
        compute: dtype in which float32 parameters are gathered and used; None for their own. Gradients are reduced in float32.

    Raises:
        ValueError: the model is sharded already, by this function or by the caller.
    """
    if ranks.count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if any(map(is_dtensor, model.parameters())):
        raise ValueError("model: got one whose parameters are sharded already, wanted a whole model on every rank")
    measure(model)
    layout, whole = ranks.layout(), list(model.parameters())
    shared: Any = [] if layout is None else divide(model, layout)
    mesh = init_device_mesh(whole[0].device.type, (ranks.count(),), mesh_dim_names=("data",))
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    layers = units_of(model)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    if shared:
        fully_shard(shared, mesh=layout.mesh["data"], mp_policy=policy, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    units: list[Any] = [model, *shared[:1], *layers]  # now FSDP modules
    for module in units:
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies first
    for parameter in whole:
        parameter.data = parameter.data.new_empty(0)
    setattr(model, _METHOD, types.MethodType(_forward, model))
    register_fsdp_forward_method(model, _METHOD)
    vars(model)[_UNITS], vars(model)[_SHARED] = units, shared[:1]


def measure(model: nn.Module) -> None:
    """Measures the head of a whole model, in a forward pass of its own, which must not run inside that of a sharded model."""
    with contextlib.suppress(UnsupportedHead):  # some methods read no head; the others raise the error when they do
        head_of(model)


def run(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns ``function(model, *arguments)``, run as one forward pass of a sharded model, in which its root unit is whole."""
    method = vars(bare(model)).get(_METHOD)
    return function(model, *arguments) if method is None else method(function, *arguments)


def call_with(layer: Any, tensors: Mapping[str, torch.Tensor], *arguments: Any, **options: Any) -> Any:
    """Calls a layer with ``tensors`` in the place of its parameters of these names, without gradients for a sharded layer."""
    if not tensors:
        return layer(*arguments, **options)
    if not any(map(is_dtensor, layer.parameters())):
        return functional_call(layer, dict(tensors), arguments, options)
    layer.unshard()
    try:  # without the layer's hooks, which would put its own parameters back
        return functional_call(
            _Unhooked(layer), {f"layer.{name}": tensor for name, tensor in tensors.items()}, arguments, options
        )
    finally:
        layer.reshard()


class _Unhooked(nn.Module):
    """Runs the forward pass of a layer without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.layer.forward(*arguments, **options)


def release(model: nn.Module) -> None:
    """Frees what a forward pass without a backward pass left whole, so that the parameters are shards again."""
    for module in vars(bare(model)).get(_UNITS, ()):
        module.reshard()


@torch.no_grad()
def whole_state(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
    """Gathers the entries of ``model.state_dict()``, one at a time, in the host memory of rank 0; None on the other ranks.

    Args:
        model: a model sharded by :func:`shard`.
        dtype: dtype of floating-point parameters; None for their own. Buffers keep theirs.
    """
    release(model)
    saved = model.state_dict().keys()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found, by_id = dict[str, torch.Tensor](), dict[int, torch.Tensor]()
    for name, tensor in {**parameters, **dict(model.named_buffers())}.items():
        if name not in saved:
            continue
        if id(tensor) not in by_id:  # tied parameters are gathered once, and stay tied
            value = full(tensor)
            if name in parameters and dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            by_id[id(tensor)] = value.cpu() if ranks.rank() == 0 else value.new_empty(0)
        found[name] = by_id[id(tensor)]
    return {name: found[name] for name in saved} if ranks.rank() == 0 else None


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a ``DTensor`` whole, on every rank; any other tensor as it is."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    placements = list(tensor.placements)
    for dimension in range(tensor.device_mesh.ndim):  # the outer ones first, as FSDP has cut the parts of a head again
        placements[dimension] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def like_shard(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of the shape of this rank's shard of ``parameter`` as a ``DTensor`` like it; any other tensor unchanged."""
    if not is_dtensor(parameter) or not tensor.ndim or tensor.shape != local_of(parameter).shape:
        return tensor
    from torch.distributed.tensor import DTensor

    where = (parameter.device_mesh, parameter.placements)
    return DTensor.from_local(tensor, *where, run_check=False, shape=parameter.shape, stride=parameter.stride())


def global_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all elements of sharded tensors, on every rank; float32."""
    locals_ = [local_of(tensor) for tensor in tensors]
    norms = torch._foreach_norm(locals_, 2, dtype=torch.float32)
    return ranks.total(torch.stack(list(norms)).square().sum()).sqrt()


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether every element of the tensors is finite, on all ranks together."""
    ends = [end for tensor in map(local_of, tensors) if tensor.numel() for end in tensor.detach().aminmax()]
    bad = sum(not bool(end.isfinite()) for end in ends)
    return not any(ranks.gather(bad))


def _forward(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    for unit in vars(model)[_SHARED]:
        unit.unshard()  # no forward pass of the head runs, which would do it
    return function(model, *arguments)


def units_of(model: nn.Module) -> list[nn.Module]:
    """Layers that become units of their own: those of the largest list whose parameters no other module shares."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return []
    layers = list(max(lists, key=lambda part: sum(p.numel() for p in part.parameters())))
    holders = dict[int, set[int]]()
    inside = {id(module): id(layer) for layer in layers for module in layer.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(inside.get(id(module), 0))
    return layers if all(len(found) == 1 for found in holders.values()) else []
