"""A weight's gradient, added in place to the one that its parameter holds: ``accumulate_into`` of the losses.

Autograd adds a gradient to ``parameter.grad`` once it is complete, so that both exist at the same time. For the weight of a head they
are ``[V, d]`` each, the largest tensors of a training step. Here the products that make the gradient are added to ``parameter.grad``
one by one. That bypasses autograd's own accumulation, and with it everything that watches it: hooks of the parameter, and the
reductions over processes of DDP and FSDP. Where something does watch, an error says so.
"""

from __future__ import annotations

from typing import Any

import torch

from undo_kernels.matmul import full_precision

_RETURNED = (
    "{name}: got torch.autograd.grad with respect to {what}, whose gradient is added to the parameter's grad in place; wanted "
    "backward(), or a loss without that option"
)
_ROWS = 4096  # rows of a gradient that are computed before they are added


class OnlyBackward:
    """Hook of a parameter that refuses ``torch.autograd.grad`` with respect to it, and leaves the gradient as it is."""

    def __init__(self, name: str, parameter: torch.Tensor) -> None:
        self.name, self.parameter = name, parameter

    def __call__(self, gradient: torch.Tensor) -> None:
        accumulates(self.name, self.parameter)


def check_unwatched(name: str, parameter: torch.Tensor) -> None:
    """Checks that nothing but ``parameter.grad`` receives the parameter's gradient.

    Raises:
        ValueError: the parameter has a hook, or is trained by several processes.
    """
    hooks = (*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values())
    foreign = [hook for hook in hooks if not isinstance(hook, OnlyBackward)]
    if foreign:
        raise ValueError(
            f"{name}: got a parameter with {len(foreign)} gradient hooks, which would not see what is added to its grad in place; "
            "wanted one without hooks"
        )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise ValueError(
            f"{name}: got a process group of {distributed.get_world_size()} processes, wanted one process: DDP and FSDP reduce the "
            "gradient that autograd gives them, and would miss what is added in place"
        )


def check_part(name: str, weight: torch.Tensor, parameter: torch.Tensor) -> None:
    """Checks that the gradient of ``weight``, which requires one, goes to the first rows of the parameter unseen and unchanged.

    Raises:
        ValueError: the weight shares the parameter's memory, but not its gradient, or something else receives that gradient.
    """
    if weight is parameter:
        return
    if weight._backward_hooks or weight.retains_grad:
        raise ValueError(
            f"{name}: got a part of the parameter with a gradient hook or retain_grad(), which would not see what is added in place; "
            "wanted one without"
        )
    node, way = weight.grad_fn, []
    while node is not None and node.next_functions:
        way.append(node.name())
        node = node.next_functions[0][0]
    # Views of torch itself pass a gradient on as it is; a custom autograd.Function may scale it. Their names end differently.
    plain = all(step.endswith("Backward0") for step in way)
    if weight._base is not parameter or getattr(node, "variable", None) is not parameter or not plain:
        raise ValueError(
            f"{name}: got a parameter whose memory the weight shares by way of {', '.join(way) or 'another leaf'}, wanted the weight "
            "itself, or the parameter that it is a plain slice of"
        )


def accumulates(name: str, parameter: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Returns whether the backward pass that runs now adds to ``parameter.grad``; it does not with other ``inputs``.

    Args:
        name: what adds in place, for the error.
        parameter: a leaf.
        weight: the part of it that the loss was given, if it is not the leaf itself.

    Raises:
        RuntimeError: the pass was started by ``torch.autograd.grad`` with respect to the parameter or the weight, and returns the
            gradient instead.
    """
    if not parameter.requires_grad:  # frozen since the forward
        return False
    try:
        own = _runs(parameter)
    except RuntimeError as error:
        raise RuntimeError(_RETURNED.format(name=name, what="the parameter")) from error
    if not own and weight is not None and weight is not parameter and _runs(weight):
        raise RuntimeError(_RETURNED.format(name=name, what="a part of the parameter"))
    return own


def _runs(tensor: torch.Tensor) -> bool:
    return torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(tensor).node)


def refuse_double_backward(name: str) -> None:
    """Raises a ``RuntimeError`` inside a backward that is to be differentiated again (``create_graph=True``)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: got create_graph=True, wanted a backward that is not differentiated again: a gradient that is added in place "
            "has no derivative"
        )


def earlier_gradient(parameter: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
    """Returns the rows of ``parameter.grad`` that belong to ``weight``, a leading part of the parameter; None: it has no gradient.

    Raises:
        ValueError: the gradient cannot be added to in place.
    """
    gradient = parameter.grad
    if gradient is None:
        return None
    if gradient.layout != torch.strided or gradient.dtype != parameter.dtype or gradient.requires_grad:
        got = f"a gradient of layout {gradient.layout} and {gradient.dtype}" + (" with a graph" * gradient.requires_grad)
        raise ValueError(
            f"accumulate_into: got a parameter with {got}, wanted a dense one of {parameter.dtype} without a graph"
        )
    return gradient[: weight.shape[0]]


class AddedProduct(torch.autograd.Function):
    """Computes ``hidden @ weight.T``; the backward adds the weight's gradient to that of the parameter that it is a part of."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, parameter: torch.Tensor, entries: int, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.parameter, ctx.weight = parameter, weight  # a saved tensor may be unpacked as another one, without a graph
        ctx.entries, ctx.dtype = entries, dtype
        with full_precision(hidden.device):
            return hidden.to(dtype) @ weight[:entries].to(dtype).T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        refuse_double_backward("accumulate_into")
        hidden, weight = ctx.saved_tensors
        own = accumulates("accumulate_into", ctx.parameter, ctx.weight)
        earlier = None
        if own:
            check_unwatched("accumulate_into", ctx.parameter)
            check_part("accumulate_into", ctx.weight, ctx.parameter)
            earlier = earlier_gradient(ctx.parameter, weight)
        d_weight = None
        with full_precision(grad.device):
            d_hidden = (grad @ weight[: ctx.entries].to(ctx.dtype)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
            if own and earlier is None:  # zero_grad() since the forward
                d_weight = torch.zeros_like(weight)
                earlier = d_weight
            if own:
                _add_product(earlier[: ctx.entries], grad.T, hidden.to(ctx.dtype))
        return d_hidden, d_weight, None, None, None


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Computes ``out += a @ b``, with a temporary of some rows where the dtypes differ."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
        return
    for first in range(0, len(out), _ROWS):
        out[first : first + _ROWS] += (a[first : first + _ROWS] @ b).to(out.dtype)
