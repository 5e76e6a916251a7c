"""The trunk of a causal language model: the final hidden states and those between its layers.

The trunk is everything that a model computes before its output layer. To run it, the model's own forward pass is started and
stopped where the output layer would begin.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from undo_core.models.adapters import bare


class UnsupportedHead(ValueError):
    """Raised when weight, bias, scale and softcap do not reproduce the model's own logits."""


def hidden_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the final hidden states ``[batch, length, d]``, which the model's head would read; the head is not run.

    With ``position_ids``, a document begins wherever they start again, and it does not attend to earlier documents.
    transformers derives this mask from the positions; it needs no attention mask and no cache for that. sdpa, which otherwise
    runs causally without a mask, then holds a mask of ``[batch, length, length]``.

    Raises:
        ValueError: ``position_ids`` for a model or an attention kernel that would let documents attend to each other.
    """
    model, options = bare(model), {}
    if position_ids is not None:
        check_isolation(model)
        options["position_ids"] = position_ids
    return _run_to_head(model, input_ids, attention_mask=attention_mask, **options)


def hidden_states_at(
    model: PreTrainedModel,
    layers: Sequence[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns :func:`hidden_states` and the list of hidden states that ``layers`` selects.

    ``layers`` counts as transformers does: 0 is the output of the embeddings, ``k`` that of the ``k``-th layer, and the last
    one is taken after the final norm.

    Raises:
        ValueError: as :func:`hidden_states`, or the model does not return hidden states between its layers.
    """
    model = bare(model)
    options: dict[str, Any] = {"output_hidden_states": True}
    if position_ids is not None:
        check_isolation(model)
        options["position_ids"] = position_ids
    inner: list[Sequence[torch.Tensor]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inner.extend([found] if (found := getattr(output, "hidden_states", None)) else [])

    handles = [module.register_forward_hook(keep) for module in trunk_path(model)]
    try:
        hidden = _run_to_head(model, input_ids, attention_mask=attention_mask, **options)
    finally:
        for handle in handles:
            handle.remove()
    if not inner:
        raise ValueError(f"model: got {type(model).__name__}, which does not give the hidden states between its layers")
    return hidden, [inner[-1][layer] for layer in layers]


def continued_states(model: PreTrainedModel, input_ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Returns :func:`hidden_states` of tokens that follow those in ``cache``, a ``DynamicCache``, which takes them up.

    Raises:
        ValueError: the model does not use the cache.
    """
    model, before = bare(model), cache.get_seq_length()
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # the older name
    hidden = _run_to_head(model, input_ids, use_cache=True, **{name: cache})
    if cache.get_seq_length() != before + input_ids.shape[1]:
        raise ValueError(f"model: got {type(model).__name__}, which does not keep keys and values in a DynamicCache")
    return hidden


@torch.no_grad()
def check_continues(model: PreTrainedModel) -> None:
    """Checks that :func:`continued_states` works for ``model``, on two tokens.

    Raises:
        ValueError: the model keeps no keys and values (a state-space model, for example), or not in a ``DynamicCache``.
    """
    model = bare(model)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    try:
        cache = DynamicCache(config=model.config)
        with evaluating(model):
            for _ in range(2):
                continued_states(model, token, cache)
    except (AttributeError, TypeError, ValueError) as error:  # transformers' caches and models have no common one
        raise ValueError(
            f"on_policy: got {type(model).__name__}, wanted a model that keeps the keys and values of earlier tokens in a DynamicCache"
        ) from error


@torch.no_grad()
def check_isolation(model: PreTrainedModel) -> None:
    """Checks that packed documents do not attend to each other; runs once per model and attention kernel.

    The check packs two documents into a sequence, changes the first, and compares the hidden states of the second.

    Raises:
        ValueError: the hidden states change: the model takes no position ids, or its attention kernel ignores them.
    """
    model = bare(model)
    kernel = model.config._attn_implementation
    if getattr(model, "_undo_isolation_verified", None) == kernel:
        return
    embedding = model.get_input_embeddings().weight
    at = torch.arange(16, device=embedding.device)
    ids = at.mul(7919).remainder(embedding.shape[0]).repeat(2, 1)
    other = torch.where(at < 8, (ids + 1).remainder(embedding.shape[0]), ids)
    try:
        leaks = []
        with evaluating(model):
            for positions in (None, at.remainder(8).repeat(2, 1)):
                given = {} if positions is None else {"position_ids": positions}
                a, b = (_run_to_head(model, x, **given)[:, 8:] for x in (ids, other))
                leaks.append(float((a - b).abs().max()))
        works = not leaks[1] > 0.1 * leaks[0]  # allows rounding; written with `not`, so that a diverged model (NaN) passes
    except TypeError:  # the model takes no position_ids
        works = False
    if not works:
        raise ValueError(
            f"position_ids: got sequences of isolated documents for {type(model).__name__} with attention {kernel}, which lets "
            "them attend to each other; wanted data.documents shared, or another model or attention kernel (eager, sdpa, "
            "flex_attention)"
        )
    model._undo_isolation_verified = kernel


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` in evaluation mode; on exit, even after an exception, each module gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def trunk_path(model: PreTrainedModel) -> list[nn.Module]:
    """Returns the modules that contain the input embeddings but not the output layer, outermost first."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, output = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    parts = embedding.split(".")[:-1]
    path = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return [model.get_submodule(name) for name in path if not output.startswith(name + ".")]


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Returns the first argument of a module's call, whether it was given by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


class _Reached(Exception):
    """Raised to stop a forward pass at the output layer; carries the hidden states that the layer would read."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _run_to_head(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Returns what the output layer would read, with its autograd graph; the forward pass ends there."""

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Reached(first_argument(args, kwargs))

    handle = model.get_output_embeddings().register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        model(input_ids=input_ids, **{"use_cache": False, **options})
    except _Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise UnsupportedHead(f"model: got a {type(model).__name__}, whose forward pass does not call its output layer")
