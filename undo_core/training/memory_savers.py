"""Memory savers of training: the attention kernel, activation checkpointing, and the in-place gradient of a tied embedding."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from undo_core.models import set_attention
from undo_core.models.adapters import bare
from undo_core.training.config import TrainConfig
from undo_core.training.embedding import TiedEmbedding, tied_gradient_in_place


def keeps_kernels(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that restores the attention kernel of the first argument, a model, on exit, even after an exception."""

    @functools.wraps(function)
    def keeping(model: nn.Module, *arguments: Any, **options: Any) -> Any:
        with kept_kernels(model):
            return function(model, *arguments, **options)

    return keeping


@contextlib.contextmanager
def kept_kernels(model: nn.Module) -> Iterator[None]:
    """Context that restores the attention kernel of a model on exit, even after an exception."""
    inner = bare(model)
    if not isinstance(inner, PreTrainedModel):
        yield
        return
    kernel = inner.config._attn_implementation
    try:
        yield
    finally:
        if inner.config._attn_implementation != kernel:
            inner.set_attn_implementation(kernel)


def choose_kernels(model: nn.Module, config: TrainConfig) -> None:
    """Sets the attention kernel of ``config`` for training and evaluation; call it before any other change of the model.

    Raises:
        ValueError: the model does not support the attention kernel, or activation checkpointing.
    """
    if not isinstance(model, PreTrainedModel):
        return
    if config.activation_checkpointing and not model.supports_gradient_checkpointing:
        raise ValueError(
            f"activation_checkpointing: got true, wanted false for {type(model).__name__}, which does not support it"
        )
    if config.attention != "auto":
        set_attention(model, config.attention)


@contextlib.contextmanager
def lean(model: nn.Module, config: TrainConfig, ranks: int = 1) -> Iterator[TiedEmbedding | None]:
    """Context in which ``model`` trains with the memory savers of ``config``.

    Yields the tied weight whose gradient is completed in place, or None. Activation checkpointing keeps only the layers' inputs
    and runs each layer again in the backward pass, which costs one more forward pass of the trunk. It does not cover the head,
    so the fused losses are not run again. A model that is not a Hugging Face model is left unchanged.
    """
    if not isinstance(model, PreTrainedModel):
        yield None
        return
    checkpointing = _activation_checkpointing(model) if config.activation_checkpointing else contextlib.nullcontext()
    with checkpointing, tied_gradient_in_place(model) if ranks == 1 else contextlib.nullcontext() as tied:
        yield tied


@contextlib.contextmanager
def _activation_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Context with activation checkpointing; restores the caller's own setting on exit.

    The switch of transformers would disable the caller's checkpointing, and leave behind the hooks that make the outputs of the
    embeddings require a gradient.
    """
    before = [(module, _held(module, _FLAGS)) for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    hooks = _held(model, _HOOKS)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed in 5.24
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        for module, held in before:
            _put_back(module, _FLAGS, held)
        if _held(model, _HOOKS) != hooks:
            model.disable_input_require_grads()
        _put_back(model, _HOOKS, hooks)


_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_HOOKS = ("_require_grads_hook", "_require_grads_hooks")


def _held(module: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _put_back(module: nn.Module, names: tuple[str, ...], held: dict[str, Any]) -> None:
    for name in names:
        vars(module).pop(name, None)
    vars(module).update(held)
