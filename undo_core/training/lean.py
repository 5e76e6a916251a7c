"""What training spends less memory with: attention kernels, activation checkpointing, a tied embedding's gradient in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from undo_core.models import set_attention
from undo_core.training.config import TrainConfig
from undo_core.training.embedding import TiedEmbedding, tied_gradient_in_place


def choose_kernels(model: nn.Module, config: TrainConfig) -> None:
    """Give ``model`` the attention kernel of ``config``, for training and evaluation; before anything else is changed.

    Raises:
        ValueError: an attention kernel that the model cannot have, or activation checkpointing that it does not support.
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
def lean(model: nn.Module, config: TrainConfig) -> Iterator[TiedEmbedding | None]:
    """Within the block ``model`` trains as ``config`` says; yields the tied weight whose gradient is completed in place, if any.

    Activation checkpointing keeps the layers' inputs and runs each layer again in the backward pass: one forward pass of the trunk
    more. The head is outside, so the fused losses are not run again. A model that is no Hugging Face model is left as it is.

    """
    if not isinstance(model, PreTrainedModel):
        yield None
        return
    if config.activation_checkpointing:
        _checkpointing(model, "enable")
    try:
        with tied_gradient_in_place(model) as tied:
            yield tied
    finally:
        if config.activation_checkpointing:
            _checkpointing(model, "disable")


def _checkpointing(model: PreTrainedModel, change: str) -> None:
    new, old = (
        getattr(model, f"{kind}_checkpointing_{change}", None) for kind in ("activation", "gradient")
    )  # renamed in 5.24
    (new or old)(*([{"use_reentrant": False}] if change == "enable" else []))
