"""Triton's kernels run on CPU tensors here, under its interpreter, unless there is a GPU; this must be said before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
