"""Dropout masks that do not depend on the number of ranks.

Every rank draws the mask of the whole micro-batch, from a generator in the same state, and uses the part of its own sequences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from undo_core.distributed import ranks
from undo_core.models.adapters import bare


@contextlib.contextmanager
def whole_dropout(model: nn.Module, sizes: Iterable[int]) -> Iterator[None]:
    """Context in which dropout draws for whole micro-batches of ``sizes`` sequences, of which :func:`ranks.share` is run here.

    Raises:
        ValueError: two micro-batches of different sizes of which this rank has equally many sequences, or dropout inside a fused
            attention kernel, whose mask cannot be drawn in advance.
    """
    if ranks.count() == 1 or not drops(model):
        yield
        return
    attention = getattr(bare(model).config, "_attn_implementation", "eager")
    if attention != "eager" and any(value > 0 for value in _configured(model, "att")):
        raise ValueError(
            f"attention: got {attention} for a model with dropout in its attention on {ranks.count()} ranks, wanted eager: the mask "
            "inside a fused kernel depends on the number of ranks"
        )
    with _Shared(sizes):
        yield


def drops(model: nn.Module) -> bool:
    """Whether the model has a dropout with a probability above 0."""
    return any(value > 0 for value in _configured(model)) or any(
        module.p > 0 for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)
    )


def _configured(model: nn.Module, part: str = "") -> list[float]:
    """Returns the dropout probabilities in the model's configuration whose names contain ``part``."""
    config = getattr(bare(model), "config", None)
    own = {} if config is None else vars(config.get_text_config())
    return [value for name, value in own.items() if "drop" in name and part in name and isinstance(value, float)]


class _Shared(TorchFunctionMode):
    def __init__(self, sizes: Iterable[int]) -> None:
        super().__init__()
        self.wholes: dict[int, tuple[int, int]] = {}
        for size in sizes:
            start, end = ranks.share(size)
            if self.wholes.setdefault(end - start, (size, start)) != (size, start):
                raise ValueError(
                    f"model: got one with dropout and micro-batches of {size} and {self.wholes[end - start][0]} sequences on "
                    f"{ranks.count()} ranks, wanted equal ones, so that each rank knows its part of the dropout mask"
                )

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention and _dropout_p(args, kwargs):
            raise ValueError(
                f"attention: got sdpa with dropout in the attention on {ranks.count()} ranks, wanted eager, whose mask does not depend "
                "on the number of ranks"
            )
        if function is nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return input
        own = len(input)
        if own not in self.wholes:
            raise ValueError(
                f"model: got a dropout over {own} entries on {ranks.count()} ranks, wanted the {sorted(self.wholes)} sequences of this rank"
            )
        size, start = self.wholes[own]
        factors = torch.dropout(torch.ones(size, *input.shape[1:], dtype=input.dtype, device=input.device), p, True)
        factors = factors[start : start + own]
        return input.mul_(factors) if inplace else input * factors


def _dropout_p(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
