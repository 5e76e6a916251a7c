"""Activations in the middle of a model, without running the layers above.

Layers are run one by one, with the arguments that their model would pass to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.distributed.sharding import call_with
from undo_core.models import check_isolation, evaluating, hidden_states
from undo_core.models.layers import owner_of_layers

Frozen = Mapping[int, Mapping[str, torch.Tensor]]
"""Tensors to use instead of a layer's parameters: by the layer's index, then by the parameter's name within the layer."""


class Trunk:
    """The list of layers of a decoder, which can be run in parts.

    For each batch the base model runs once with stand-ins for its layers: it embeds the tokens and makes masks and position
    embeddings, and the stand-ins record the arguments of each layer. Hidden states after ``k`` layers equal entry ``k`` of
    ``output_hidden_states``, except that after the last layer they are those before the final norm.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises a ValueError if ``model`` has no list of layers, or does more than call its layers one after another."""
        self.model = model
        self.owner, self.name = owner_of_layers(model)
        self.layers: nn.ModuleList = getattr(self.owner, self.name)
        self._verify()

    def enter(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Entered:
        """Prepares a batch of ``[batch, length]`` ids up to the first layer, in evaluation mode and without gradients."""
        if position_ids is not None:
            check_isolation(self.model)  # needs the real layers
        calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []
        stand_ins = nn.ModuleList(_StandIn(layer, calls) for layer in self.layers)
        with torch.no_grad(), evaluating(self.model):
            setattr(self.owner, self.name, stand_ins)
            try:
                hidden_states(self.model, input_ids, attention_mask, position_ids)
            finally:
                setattr(self.owner, self.name, self.layers)
        if len(calls) != len(self.layers):
            raise ValueError(
                f"model: got {type(self.model).__name__}, which called {len(calls)} of its {len(self.layers)} layers"
            )
        return Entered(self, calls)

    @torch.no_grad()
    def _verify(self) -> None:
        """Compares the activations with the model's own on a few tokens, so that wrong ones are never used silently."""
        embedding = self.model.get_input_embeddings().weight
        ids = torch.arange(8, device=embedding.device).mul(7919).remainder(embedding.shape[0]).view(1, 8)
        with evaluating(self.model):
            wanted = self.model.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
            entered = self.enter(ids)
            hidden = entered.hidden
            for k in range(len(self.layers)):  # not after the last layer: the model returns that one after the final norm
                error = float((hidden - wanted[k]).norm() / wanted[k].norm().clamp_min(1e-6))
                if not error <= (1e-4 if hidden.dtype == torch.float32 else 3e-2):
                    raise ValueError(
                        f"model: got {type(self.model).__name__}, whose hidden states after {k} layers differ by {error:.2g} "
                        "when its layers are called one by one; it does something between them"
                    )
                hidden = entered.run(hidden, k, k + 1)


class Entered:
    """A batch prepared up to the first layer; ``hidden`` ``[batch, length, d]`` is the input of that layer."""

    def __init__(self, trunk: Trunk, calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.trunk, self.calls, self.hidden = trunk, calls, calls[0][0]

    def run(self, hidden: torch.Tensor, first: int, last: int, frozen: Frozen | None = None) -> torch.Tensor:
        """Runs ``hidden`` through the layers ``[first, last)``; tensors in ``frozen`` replace the layers' own parameters."""
        for k in range(first, last):
            _, args, kwargs = self.calls[k]
            layer, others = self.trunk.layers[k], {} if frozen is None else frozen.get(k, {})
            output = call_with(layer, others, hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        return hidden


class _StandIn(nn.Module):
    """Records the arguments of a layer and returns its input hidden states; has the attributes of the layer."""

    def __init__(self, layer: nn.Module, calls: list[Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_of", (layer, calls))  # in a tuple, so that it is not registered as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_of"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        self._of[1].append((hidden, args, kwargs))
        return hidden
