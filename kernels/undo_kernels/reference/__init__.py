"""Every op in plain PyTorch: the definition, and the oracle of the faster backends."""

from undo_kernels.reference import noise, plan, rmu, vocab_loss

__all__ = ["noise", "plan", "rmu", "vocab_loss"]
