"""Kernels for GPUs in Triton; under ``TRITON_INTERPRET=1`` the same kernels run on CPU tensors, for tests.

``plan`` and ``tile_table`` import without triton.
"""

from __future__ import annotations

import torch

from undo_kernels.library.backends import mark_unavailable

__all__: list[str] = []

try:
    import triton
except ImportError as error:
    mark_unavailable(
        "triton", f"triton cannot be imported ({error}); it comes with torch on GPU machines, or pip install triton"
    )
else:
    from undo_kernels.triton import noise, rmu, vocab_loss

    __all__ += ["noise", "rmu", "vocab_loss"]
    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        mark_unavailable("triton", "no GPU was found; TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests")
