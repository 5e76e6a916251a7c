"""Thin bindings to the C++ kernels of ``csrc/``; torch must be imported first, so that they share its OpenMP threads."""

from undo_kernels.cpu import noise, plan, rmu, vocab_loss
from undo_kernels.cpu.instruction_set import instruction_sets

__all__ = ["instruction_sets", "noise", "plan", "rmu", "vocab_loss"]
