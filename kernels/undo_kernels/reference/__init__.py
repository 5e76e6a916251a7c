"""Every op in plain PyTorch: the definition, and the oracle of the faster backends."""

from undo_kernels.reference import losses, noise, plan, rmu

__all__ = ["losses", "noise", "plan", "rmu"]
