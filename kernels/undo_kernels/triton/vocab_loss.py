"""The losses over the vocabulary on GPUs: ``run.py`` holds the state of a call; ``chunk.py`` and ``recompute.py``
launch the kernels of the two plans.

The kernels are in ``row_kernels.py`` (stored logits) and ``tile_kernels.py`` (tiles of logits that are never stored);
``pair_math.py`` has the functions that they share.
"""

from __future__ import annotations

import torch
import triton

from undo_kernels.library.backends import register
from undo_kernels.problem import Problem, Result
from undo_kernels.record import Call, record, recording
from undo_kernels.triton.chunk import Chunks
from undo_kernels.triton.device import current
from undo_kernels.triton.products import Workspace
from undo_kernels.triton.recompute import Recompute
from undo_kernels.triton.run import Run

INTERPRETED = triton.knobs.runtime.interpret


@register("vocab_loss", "triton")
@torch.no_grad()
def vocab_loss(problem: Problem) -> Result:
    """Computes a problem's total, its rows' losses and the gradients in ``needs``; float32, bfloat16 and float16 inputs."""
    return run(problem, Workspace(problem.student.hidden.device))


def run(problem: Problem, scratch: Workspace) -> Result:
    """Computes :func:`vocab_loss` with a workspace that the caller holds.

    Raises:
        RuntimeError: the tensors are not on a GPU, and Triton does not interpret its kernels.
        TypeError: float64 inputs.
    """
    hidden = problem.student.hidden
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"backend: got triton for tensors on {hidden.device}, wanted a GPU or TRITON_INTERPRET=1")
    if hidden.dtype == torch.float64:
        raise TypeError("dtype: got torch.float64, wanted float32, bfloat16 or float16 on the triton backend")
    with current(hidden.device):
        call = Run(problem, scratch)
        if recording():
            plan, form = "inplace" if problem.inplace else call.plan.name, "interpreted" if INTERPRETED else ""
            record(Call("vocab_loss", "triton", plan, form, call.n, call.vocabulary, call.shapes.gradient))
        if call.n:
            (Recompute if call.plan.name == "recompute" else Chunks)(call).passes()
        return call.result()
