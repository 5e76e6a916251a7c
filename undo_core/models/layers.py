"""The layers of a decoder: its list of them, and their outputs, which can be read or replaced while the model runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from undo_core.models.heads import head_of
from undo_core.models.trunk import evaluating, hidden_states


def find_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder's list of layers; raises a ValueError if there is none."""
    return getattr(*owner_of_layers(model))


def owner_of_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """Returns the module that owns the list of decoder layers, and the name of the list in it."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return module, name
    raise ValueError(f"model: got {type(model).__name__}, in which no list of its {count} layers was found; wanted one")


def layer_at(model: PreTrainedModel, depth: float) -> int:
    """Returns the index of the layer that ends at a share ``depth`` in (0, 1] of the decoder: 1 is the last layer."""
    return max(1, round(depth * len(find_layers(model)))) - 1


def change_output(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> RemovableHandle:
    """Replaces the output hidden states ``[batch, length, d]`` of a layer by ``change`` of them until the handle is removed."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = change(output[0] if isinstance(output, tuple) else output)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return layer.register_forward_hook(hook)


@contextlib.contextmanager
def kept_outputs(model: PreTrainedModel, indices: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Context in which each forward pass of ``model`` leaves the outputs of the layers ``indices`` in the yielded dictionary."""
    kept: dict[int, torch.Tensor] = {}
    layers = find_layers(model)

    def keep(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def change(hidden: torch.Tensor) -> torch.Tensor:
            kept[index] = hidden
            return hidden

        return change

    handles = [change_output(layers[index], keep(index)) for index in indices]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def patched(model: PreTrainedModel, other: PreTrainedModel, index: int, name: str = "original") -> Iterator[None]:
    """Context in which the layer ``index`` of ``model`` outputs what that layer of ``other`` does for the same tokens.

    ``other`` runs up to its head before each forward pass of ``model``. ``name`` is that of the argument in an error.

    Raises:
        ValueError: the models differ in their number of layers or in the width of their hidden states.
    """
    shapes = [(len(find_layers(each)), each.get_input_embeddings().weight.shape[1]) for each in (model, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{name}: got models of {shapes[1][0]} layers of width {shapes[1][1]} and of {shapes[0][0]} layers of width "
            f"{shapes[0][1]}, wanted models of one shape"
        )
    head_of(model)  # measures the head with the model's own hidden states, before they are replaced

    def run_other(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        columns = [kwargs.get(name) for name in ("input_ids", "attention_mask", "position_ids")]
        with torch.no_grad(), evaluating(other):
            hidden_states(other, *columns)

    with kept_outputs(other, [index]) as kept:
        handles = [model.register_forward_pre_hook(run_other, with_kwargs=True)]
        handles.append(change_output(find_layers(model)[index], lambda hidden: kept[index].to(hidden)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
