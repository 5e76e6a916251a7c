"""Thin bindings to the C++ kernels of ``csrc/``; torch must be imported first, so that they share its OpenMP threads."""

from undo_kernels.cpu import noise, plan, rmu, vocab_loss
from undo_kernels.cpu.instruction_set import bfloat16_products, emulations, instruction_sets, vector_units

__all__ = ["bfloat16_products", "emulations", "instruction_sets", "noise", "plan", "rmu", "vector_units", "vocab_loss"]
