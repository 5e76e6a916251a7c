"""Every op in plain PyTorch: its definition, and what the tests compare the other backends with."""

from undo_kernels.reference import noise, plan, rmu, vocab_loss

__all__ = ["noise", "plan", "rmu", "vocab_loss"]
