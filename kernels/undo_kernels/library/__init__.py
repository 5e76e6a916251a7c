"""The ops that torch knows: for each its schema, implementation, fake and gradient, side by side in one file.

``torch.ops.undo.vocab_loss``, ``vocab_loss_tokens`` and ``vocab_loss_logits_`` are the losses over the vocabulary, ``rmu_loss``
is RMU's activation loss, ``noise_`` changes parameters in place, and ``scale_`` multiplies a gradient in place. The faces in
``undo_kernels.ops`` call them.
"""

from undo_kernels.library import backends, noise, rmu, scale, vocab_loss

__all__ = ["backends", "noise", "rmu", "scale", "vocab_loss"]
