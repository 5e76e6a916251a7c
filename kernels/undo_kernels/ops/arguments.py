"""Arguments that several faces share, checked and brought into the form that the backends take."""

from __future__ import annotations

from typing import Any, Literal

import torch

from undo_kernels.accumulation import check_part, check_unwatched, earlier_gradient
from undo_kernels.ops import checks
from undo_kernels.ops.dispatch import LossReduction
from undo_kernels.ops.layout import check_apart
from undo_kernels.ops.vocabulary_parallel import local_head
from undo_kernels.projection import GivenLogits, Projection

Reduction = Literal["mean", "sum", "none"]


def projection(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    vocab_size: int | None,
    prefix: str = "",
    accumulate_into: torch.Tensor | None = None,
) -> Projection:
    """Returns the hidden states, flattened to ``[tokens, d]``, with their head and its options."""
    check_shape(prefix, scale, softcap, temperature)
    into = accumulated_into(accumulate_into, hidden, weight, prefix)
    softcap = None if softcap is None else float(softcap)
    hidden, weight, bias, vocab_size, shard = local_head(prefix, hidden, weight, bias, vocab_size)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return Projection(flat, weight, bias, float(scale), softcap, float(temperature), vocab_size, shard, into)


def accumulated_into(parameter: Any, hidden: torch.Tensor, weight: torch.Tensor, prefix: str) -> torch.Tensor | None:
    """Returns the parameter whose gradient the weight's is added to in place; None where autograd has nothing to add it to.

    A parameter without a gradient takes the first one as it is. One that is frozen, or a call without gradients, takes none.
    """
    if parameter is None:
        return None
    name, wanted = "accumulate_into", f"{prefix}weight itself, or the parameter that it is the first rows of"
    if torch.compiler.is_compiling():
        checks.fail(
            name, "a call inside torch.compile", "a call outside it: the gradient is added where the graph cannot see it"
        )
    checks.dense(name, parameter, f"that is {wanted}")
    if checks.is_dtensor(parameter) or checks.is_dtensor(weight):
        checks.fail(name, "a DTensor", "a plain tensor: autograd accumulates the gradient of a sharded head")
    if not parameter.is_leaf:
        checks.fail(name, "a tensor that was computed", f"{wanted}, a leaf with a grad")
    same = parameter.data_ptr() == weight.data_ptr() and parameter.stride() == weight.stride()
    fits = parameter.dtype == weight.dtype and parameter.shape[1:] == weight.shape[1:] and len(parameter) >= len(weight)
    if not (same and fits):
        checks.fail(name, f"another tensor, of shape {tuple(parameter.shape)} and {parameter.dtype}", wanted)
    if parameter.dtype == torch.float16:
        checks.fail(name, "a float16 parameter", "float32 or bfloat16: the gradient of float16 is scaled once it is complete")
    if not (torch.is_grad_enabled() and weight.requires_grad and parameter.requires_grad):
        return None
    check_part(name, weight, parameter)
    check_unwatched(name, parameter)
    gradient = earlier_gradient(parameter, weight)
    if gradient is None:
        return None
    check_apart(name, {"grad": gradient, f"{prefix}hidden": hidden, f"{prefix}weight": weight}, {"grad"})
    return parameter


def check_shape(prefix: str, scale: Any, softcap: Any, temperature: Any) -> None:
    """Checks the options that shape the logits of a head."""
    checks.number(f"{prefix}scale", scale, "a finite number")
    if softcap is not None:
        checks.positive(f"{prefix}softcap", softcap, "None, or a number > 0")
    checks.positive("temperature", temperature)


def given_logits(name: str, logits: torch.Tensor, temperature: float, vocab_size: int | None) -> Projection:
    """Returns logits that exist already as a projection that yields them."""
    checks.positive(name, temperature)
    if checks.is_dtensor(logits):
        wanted = "a plain tensor; for a head that is sharded by vocabulary entries call the linear form, which needs no logits"
        checks.fail("logits", f"a DTensor with placements {tuple(logits.placements)}", wanted)
    if not logits.shape[-1]:
        checks.fail("student_logits", f"shape {tuple(logits.shape)}", "[..., V] with V >= 1")
    flat = logits.reshape(-1, logits.shape[-1])
    return GivenLogits(flat, flat, temperature=float(temperature), vocab_size=vocab_size)


def labels_of(
    labels: Any, leading: torch.Size, device: torch.device, vocabulary: int, ignore_index: int, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the labels ``[tokens]``, with -1 where there is none, and which tokens have one."""
    checks.ignore_index(ignore_index)
    labels = checks.per_token("labels", labels, leading, "int", device).reshape(-1).long()
    labelled = labels != ignore_index if counted is None else (labels != ignore_index) & counted
    checks.labels_within(labels, labelled, vocabulary, ignore_index)
    # A label that is neither a vocabulary entry nor ignored is found here on CPUs; elsewhere it makes the loss NaN.
    return torch.where(labelled, torch.where(labels < 0, vocabulary, labels), -1), labelled


def mask_of(mask: torch.Tensor | None, leading: torch.Size, device: torch.device) -> torch.Tensor | None:
    """Returns the mask flattened to ``[tokens]``, or None."""
    return None if mask is None else checks.per_token("mask", mask, leading, "bool", device).reshape(-1)


def memory(plan: Any, workspace_bytes: Any) -> dict[str, Any]:
    """Returns ``plan`` and ``workspace_bytes`` as keyword arguments of a problem."""
    checks.choice("plan", plan, ("auto", "direct", "chunk", "recompute"))
    return {"plan": plan, "workspace_bytes": checks.workspace(workspace_bytes)}


def shaped(loss: tuple[torch.Tensor, Any], reduction: LossReduction) -> torch.Tensor:
    """Returns the loss in the tokens' shape with ``reduction="none"``, else as it is."""
    return loss[0].view(reduction.leading) if reduction.kind == "none" else loss[0]
