"""The public ops: losses over the vocabulary that hold no logits, in-place noise, and RMU's activation loss.

Each function checks its arguments once and hands them to the backend that ``undo_kernels.library.backends`` chooses: Triton on GPUs, C++ on
CPUs, plain PyTorch elsewhere. The losses go from hidden states and the weight of a head to a number::

    z = softcap(scale * (h @ W.T + b)) / temperature        softcap(z) = c * tanh(z / c)

No op shifts labels. The losses share these options:

- ``mask`` ``[...]`` bool: True counts. A masked token has no influence and zero gradient, even where it holds NaN. If every token
  is masked, the loss is 0.
- ``token_weight`` ``[...]`` float: multiplies each token's loss, and not the denominator of the mean. A token of weight 0 has no
  influence either, even where it holds NaN, but the denominator still counts it.
- ``vocab_size``: entries of the head from here on are padding. They get no probability and zero gradient.
- ``reduction``: ``mean`` over counted tokens, ``sum``, or ``none`` (``[...]``, with zeros where masked).
- ``normalizer``: a float or a 0-d tensor that replaces the denominator of the mean, for accumulation over micro-batches; no gradient.
- ``max_counted``: an upper bound on the number of counted tokens that the host knows. If more count, the loss is NaN.
- ``plan``: ``direct`` is plain PyTorch, which holds ``[tokens, V]``. ``chunk`` keeps the logits of some tokens between the pass that
  finds the log-sum-exps and the pass that turns the logits into their gradient. ``recompute`` projects twice and keeps no logits.
  ``auto`` takes the fastest plan that fits, and plain PyTorch for float64 and where the logits are few.
- ``workspace_bytes``: a bound on all memory beyond inputs, outputs and a few floats a token. The default follows from shapes and
  dtypes alone. Fresh memory is slow on a CPU: each thread keeps its workspace for the next call, and a large weight's gradient is
  written into the memory of an earlier one that nothing uses any more. ``undo_kernels.release_workspace()`` frees both. Plain PyTorch
  processes the tokens in chunks and recomputes them in the backward.

- ``accumulate_into``: the parameter that is the head's weight (or whose first rows are). Where it has a gradient already, as in every
  micro-batch after the first, autograd would hold a second one, ``[V, d]``, until it is complete, and then add it. With this option the
  backward adds the products themselves to ``parameter.grad``. They are the same products; only the order of the sum differs, within the
  rounding of the gradient's dtype. It holds the workspace and nothing else of the weight's size, and projects the logits again: 6
  products instead of 4 for a divergence between two heads, 4 instead of 3 for the others. (A bfloat16 gradient of more than eight chunks
  is summed in float32, in the workspace; ``plan="recompute"`` holds no such sum.) The first gradient is computed as without the option,
  bit for bit, and so is any gradient in a call without one; losses that share one backward hold one each until then. Any incoming
  gradient (a loss scale, a sum of losses), ``retain_graph``, and ``zero_grad()`` between forward and backward are right. (Inside
  ``torch.utils.checkpoint`` the forward runs twice, and torch raises an error if the parameter has a gradient in one of them alone.) A
  frozen parameter takes no gradient. Refused, as they would miss what is added: ``create_graph``, ``torch.autograd.grad`` by the
  parameter or a part of it, gradient hooks on either, weights that are not a plain slice of the parameter, DTensors, several
  processes (DDP, FSDP), ``torch.compile``; and float16 parameters, whose gradient is scaled once it is complete.

**Infinite logits.** A logit of -inf (from a bias, or given) has probability 0, and ``0 log 0 = 0``. The loss is +inf where the student
gives probability 0 to something that its target has (``p_s = 0 < p_t``; for reverse KL ``p_t = 0 < p_s``). The gradient by the logits
stays ``p_s - p_t`` there; for reverse KL it has no limit and is NaN at that token. JSD is always finite. A token with a logit of +inf or
NaN, or with none but -inf, gives NaN. Such a NaN stays out of the other tokens' gradients, but the gradients of weight and bias are
sums over tokens and contain it; mask the token, or give it weight 0, to leave it out. All backends agree on this.

**Sharded heads.** The weight, and the bias with it, may be a ``DTensor`` with placement ``Shard(0)`` on a mesh of one dimension: every
process of the mesh passes the same tokens and computes its part of the vocabulary, and all of them get the same loss and the same
gradient of the hidden states; that of the weight stays sharded. :mod:`undo_kernels.vocabulary_shard` says what they exchange.

**Dtypes.** Hidden states and weights may be float32, bfloat16, float16 or float64, and may differ. The arithmetic is float32 at least,
no logit is rounded to 16 bits, also under ``torch.autocast``, and gradients take their input's dtype.

**Gradients.** The forward computes the gradients of a scalar loss, and the backward scales them in place. A second backward through
the same graph therefore raises, except in plain PyTorch. With ``reduction="none"`` the backward computes them. Inside activation
checkpointing, name the op as one to be saved, or its work is done twice::

    context_fn = functools.partial(create_selective_checkpoint_contexts, [torch.ops.undo.vocab_loss.default])

**Errors.** A wrong shape, dtype, device or value is a ``ValueError`` that names the argument, before anything is computed.
"""

from undo_kernels.ops.cross_entropy import linear_cross_entropy, linear_lse, linear_uniform_kl
from undo_kernels.ops.explain import explain
from undo_kernels.ops.kl import KLStats, kl_div, linear_kl_div
from undo_kernels.ops.noise import noise_, replay
from undo_kernels.ops.noise_rules import NoiseRule
from undo_kernels.ops.rmu import misdirection, rmu_loss
from undo_kernels.ops.sparse_kl import linear_sparse_kl_div, sparse_kl_div

__all__ = [
    "KLStats",
    "NoiseRule",
    "explain",
    "kl_div",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_lse",
    "linear_sparse_kl_div",
    "linear_uniform_kl",
    "misdirection",
    "noise_",
    "replay",
    "rmu_loss",
    "sparse_kl_div",
]
