"""Counting the memory of a computation on the meta device, where tensors have shapes and no contents."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from undo_kernels.plan import cpu_plan
from undo_kernels.torch_ops import problem_of

FUSED = "undo-fused"  # an attention kernel of transformers, for the meta device


class Storages(TorchDispatchMode):
    """Counts the storages that operations inside the ``with`` block make, by kind, while they live.

    The workspace of the fused losses, which is no tensor there, comes from their plan, every row counting.

    Args:
        kinds: names to count under; ``activations``, ``gradients`` and ``workspace`` among them.

    Attributes:
        now: bytes alive of each kind.
        kind: what new storages count as.
        moment: name of what is going on.
        peaks: ``now`` at the largest sum of each moment.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        super().__init__()
        self.now = dict.fromkeys(kinds, 0)
        self.kind, self.moment = "activations", ""
        self.peaks: dict[str, dict[str, int]] = {}
        self._held: dict[int, tuple[str, int]] = {}

    def hold(self, tensors: Iterable[torch.Tensor], kind: str, share: float = 1.0) -> None:
        """Count tensors as ``kind`` from now on; a share of their bytes, where not all of them are there at once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, int(storage.nbytes() * share)
            if key in self._held:
                before, old = self._held[key]
                self.now[before] -= old
            else:
                weakref.finalize(storage, self._free, key)
            self._held[key] = (kind, size)
            self.now[kind] += size

    def touch(self, kind: str, size: float) -> None:
        """Memory that is taken and given back at once."""
        self._mark({**self.now, kind: self.now[kind] + int(size)})

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            # The host asks whether nothing is masked, whether no rows are packed, how large an error is.
            return True if args[0].dtype == torch.bool else 0.0 if args[0].is_floating_point() else 0
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._held:
                self.hold([tensor], self.kind)
        if function is torch.ops.undo.vocab_loss.default:
            self.hold([output[-2]], "gradients")  # of the head's weight
        if function in (torch.ops.undo.vocab_loss.default, torch.ops.undo.vocab_loss_rows.default):
            self._workspace(args)
        self._mark(self.now)
        return output

    def _workspace(self, args: tuple[Any, ...]) -> None:
        problem, backend = problem_of(*args)
        if backend == "cpu":  # the thread keeps it
            from undo_kernels.cpu.losses import has_amx

            size = cpu_plan(problem, problem.rows, has_amx()).workspace_bytes
            self.now["workspace"] = max(self.now["workspace"], size)
        else:
            from undo_kernels.triton import costs, tuning

            self.touch("workspace", costs.gpu_plan(problem, tuning.target_of(torch.device("cuda"))).workspace_bytes)

    def _mark(self, now: dict[str, int]) -> None:
        if self.moment not in self.peaks or sum(now.values()) > sum(self.peaks[self.moment].values()):
            self.peaks[self.moment] = dict(now)

    def _free(self, key: int) -> None:
        kind, size = self._held.pop(key)
        self.now[kind] -= size


def fused_attention(module: torch.nn.Module, *args: Any, softcap: float | None = None, **kwargs: Any) -> Any:
    """An attention function for transformers with the memory of a fused kernel, whatever caps its scores."""
    with _Fused():
        return sdpa_attention_forward(module, *args, **kwargs)


AttentionInterface.register(FUSED, fused_attention)
AttentionMaskInterface.register(FUSED, sdpa_mask)


class _Fused(TorchFunctionMode):
    """On the meta device PyTorch would choose the kernel that holds the scores."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and not kwargs.get("dropout_p"):
            named = {**dict(zip(_QKV, args, strict=False)), **kwargs}
            return _Attention.apply(*(named[name] for name in _QKV))
        return function(*args, **kwargs)


_QKV = ("query", "key", "value")


class _Attention(torch.autograd.Function):
    """Shapes of a fused attention: it keeps its inputs, its output and a float32 log-sum-exp a row."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length, dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
