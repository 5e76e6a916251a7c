"""Counts the memory of a computation on the meta device, where tensors have shapes but no contents."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from undo_kernels.cpu.plan import cpu_plan
from undo_kernels.library.vocab_loss import problem_of
from undo_kernels.problem import Problem

FUSED = "undo-fused"  # name under which transformers finds the fused attention for the meta device


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live storages that operations inside the ``with`` block allocate, by part of the memory.

    The workspace of the fused losses is not a tensor on the meta device; it is taken from their plan, with no row masked.

    Args:
        parts: names of the parts to count; they must include ``activations``, ``gradients`` and ``workspace``.
        called: called with each problem that a fused loss computes.

    Attributes:
        now: live bytes of each part.
        part: part to which new storages are counted.
        phase: name of the current phase, such as forward or step.
        peaks: ``now`` at the largest sum of each phase.
    """

    def __init__(self, parts: Iterable[str], called: Callable[[Problem], None] = lambda problem: None) -> None:
        super().__init__()
        self._called = called
        self.now = dict.fromkeys(parts, 0)
        self.part, self.phase = "activations", ""
        self.peaks: dict[str, dict[str, int]] = {}
        self._held: dict[int, tuple[str, int]] = {}

    def hold(self, tensors: Iterable[torch.Tensor], part: str, share: float = 1.0) -> None:
        """Counts tensors, or a share of their bytes, as ``part`` as long as they live."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, int(storage.nbytes() * share)
            if key in self._held:
                before, old = self._held[key]
                self.now[before] -= old
            else:
                weakref.finalize(storage, self._free, key)
            self._held[key] = (part, size)
            self.now[part] += size

    def touch(self, part: str, size: float) -> None:
        """Counts memory that is allocated and freed again at once."""
        self._mark({**self.now, part: self.now[part] + int(size)})

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            # The code reads a scalar: whether nothing is masked, whether no sequences are packed, or how large an error is.
            return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        if any(each.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl for each in types):
            return NotImplemented  # a quantised tensor: its inner tensors are dispatched here again
        output = _run(function, args, kwargs or {})
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self.hold([tensor], self.part)
        if function is torch.ops.undo.vocab_loss.default:
            self.hold([output[-2]], "gradients")  # of the head's weight
            self._workspace(*problem_of(*args, **kwargs))
        elif function is torch.ops.undo.vocab_loss_tokens.default:
            problem, backend = problem_of(*args, **kwargs)
            self._workspace(dataclasses.replace(problem, needs=(False, False, False)), backend)
        self._mark(self.now)
        return output

    def _workspace(self, problem: Problem, backend: str) -> None:
        self._called(problem)
        if backend == "cpu":
            from undo_kernels.cpu.instruction_set import bfloat16_product

            plan = cpu_plan(problem, problem.tokens, bool(bfloat16_product()))
            kept = plan.kept_bytes(problem)  # a thread keeps the largest workspace that it has used
            self.now["workspace"] = max(self.now["workspace"], kept)
            self.touch("workspace", plan.workspace_bytes - kept)
        else:
            from undo_kernels.triton import plan as costs
            from undo_kernels.triton import tile_table

            self.touch("workspace", costs.gpu_plan(problem, tile_table.target_of(torch.device("cuda"))).workspace_bytes)

    def _mark(self, now: dict[str, int]) -> None:
        if self.phase not in self.peaks or sum(now.values()) > sum(self.peaks[self.phase].values()):
            self.peaks[self.phase] = dict(now)

    def _free(self, key: int) -> None:
        part, size = self._held.pop(key)
        self.now[part] -= size


_shapes: dict[Any, Any] = {}


def _run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns ``function(*args, **kwargs)``; for inputs on the meta device, the output shapes come from a cache.

    The layers of a model are alike, and so are the models that are compared. Without the cache, computing the same shapes again
    takes most of the time.
    """
    given: list[torch.Tensor] = []
    key = (function, _key(args, given), _key(tuple(kwargs.items()), given))
    schema = function._schema
    aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
    if aliases or not given or not all(tensor.is_meta for tensor in given):
        return function(*args, **kwargs)
    if key in _shapes:
        leaves, spec = _shapes[key]
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in leaves]
        return tree_unflatten(made, spec)
    output = function(*args, **kwargs)
    leaves, spec = tree_flatten(output)
    if leaves and all(isinstance(leaf, torch.Tensor) and _fresh(leaf, given) for leaf in leaves):
        _shapes[key] = [(leaf.shape, leaf.stride(), leaf.dtype) for leaf in leaves], spec
    return output


def _key(value: Any, given: list[torch.Tensor]) -> Any:
    """Returns a hashable description of an argument, from which output shapes follow; adds its tensors to ``given``."""
    if isinstance(value, torch.Tensor):
        given.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_key(part, given) for part in value)
    return type(value), value


def _fresh(output: torch.Tensor, given: list[torch.Tensor]) -> bool:
    """Whether ``output`` is a meta tensor with its own storage, which is no larger than the tensor."""
    storage = output.untyped_storage()
    least = (
        0 if not output.numel() else 1 + sum((n - 1) * stride for n, stride in zip(output.shape, output.stride(), strict=True))
    )
    alone = all(storage._cdata != tensor.untyped_storage()._cdata for tensor in given)
    return output.is_meta and alone and storage.nbytes() == least * output.itemsize


def fused_attention(module: torch.nn.Module, *args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
    """Attention function for transformers with the memory of a fused kernel, with or without a softcap."""
    with _Fused():
        return sdpa_attention_forward(module, *args, **kwargs)


AttentionInterface.register(FUSED, fused_attention)
AttentionMaskInterface.register(FUSED, sdpa_mask)


class _Fused(TorchFunctionMode):
    """Replaces PyTorch's attention, which on the meta device would use the kernel that stores all scores."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            named = {**dict(zip(_QKV, args, strict=False)), **kwargs}
            return _Attention.apply(*(named[name] for name in _QKV))
        return function(*args, **kwargs)


_QKV = ("query", "key", "value")


class _Attention(torch.autograd.Function):
    """Fused attention on the meta device: saves its inputs, its output and one float32 log-sum-exp for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
