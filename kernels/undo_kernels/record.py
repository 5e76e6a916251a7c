"""Records which backend and plan ran.

``undo_kernels.ops.explain`` predicts a plan; this lists the calls that were made::

    with undo_kernels.recorded() as calls:
        loss = undo_kernels.ops.linear_kl_div(...)
        loss.backward()
    print(calls[0].backend, calls[0].plan)

The implementations report themselves, so a call that was redirected (a small problem, float64, a missing compiler) appears under the
backend that did the work. Outside a ``with`` block nothing is recorded, and recording costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Call:
    """One execution of an implementation.

    Attributes:
        op: ``vocab_loss`` (every loss over the vocabulary), ``rmu_loss`` or ``noise_``.
        backend: ``triton``, ``cpu`` (C++) or ``reference`` (plain PyTorch).
        plan: the name that ``explain`` prints, such as ``direct``, ``chunk``, ``recompute`` or ``one pass``; ``inplace`` where
            given logits, or parameters, are overwritten.
        form: of the C++ kernels the instruction set, such as ``avx2`` or ``avx512+amx``; ``interpreted`` of Triton's
            interpreter; else empty.
        tokens: tokens that the implementation worked on: C++ and plain PyTorch leave masked ones out, Triton only with ``max_counted``.
            Of ``noise_`` the number of tensors, or of pieces where they are sharded.
        vocabulary: vocabulary entries that take part; of ``rmu_loss`` the width, of ``noise_`` the number of elements.
        gradient: whether this call computed gradients. The fused backends compute the gradient of a scalar loss in the forward. With
            ``reduction="none"``, and always in plain PyTorch, the backward is a second call.
    """

    op: str
    backend: str
    plan: str
    form: str
    tokens: int
    vocabulary: int
    gradient: bool = False


# One list for the process, and not a context variable, because the backward of GPU tensors runs in a thread of autograd.
_open: list[list[Call]] = []


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Lists the calls that run inside the ``with`` block, in any thread, in the order in which they start.

    Blocks may be nested; each gets every call. A compiled graph records the fused ops as it runs them. Plain PyTorch becomes
    part of the graph, where it can no longer be told apart, and is not recorded.
    """
    calls: list[Call] = []
    _open.append(calls)
    try:
        yield calls
    finally:
        _open[:] = [other for other in _open if other is not calls]


def recording() -> bool:
    """Whether a call would be recorded; implementations ask before they collect what to report."""
    return not torch.compiler.is_compiling() and bool(_open)


def record(call: Call) -> None:
    """Adds a call to the lists of all open blocks."""
    for calls in _open:
        calls.append(call)


def record_autograd(call: Call, outputs: Sequence[torch.Tensor]) -> None:
    """Adds a call of plain PyTorch, and arranges that its backward adds another when autograd reaches one of the outputs."""
    record(call)
    differentiated = [output for output in outputs if output.requires_grad]
    if differentiated:
        backward = replace(call, gradient=True)
        torch.autograd.graph.register_multi_grad_hook(differentiated, lambda _: record(backward), mode="any")
