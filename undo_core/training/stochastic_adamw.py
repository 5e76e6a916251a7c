"""AdamW whose bfloat16 weights and moments are rounded stochastically, by bits that depend on the element and not on the rank."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from undo_kernels.ops.sharding import local_pieces

from undo_core.training.precision import random_bits, round_stochastically_, seeded

# Elements converted to float32 at a time: a CPU block fits a core's cache, a GPU block occupies every SM.
BLOCK_CPU, BLOCK_GPU = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Held:
    """The elements of a parameter that this process updates.

    Attributes:
        number: number of the parameter among the trained ones.
        size: elements of the whole parameter.
        runs: first element and length of each run of them in the whole parameter, in order.
    """

    number: int
    size: int
    runs: tuple[tuple[int, int], ...]


def held(number: int, parameter: torch.Tensor) -> Held:
    """Returns the elements of a parameter, which may be a ``DTensor``, that this process has."""
    runs = []
    for view, first, run, stride in local_pieces("parameter", parameter):
        length = run or view.numel()
        runs += [(first + index * stride, length) for index in range(view.numel() // max(1, length))]
    return Held(number, parameter.numel(), tuple(runs))


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 weights and moments, computed in float32, all three rounded stochastically.

    With rounding to nearest the second moment would stop changing: a step changes it by ``1 - beta2 = 0.001`` of its value,
    which is below half the spacing of bfloat16. The bits drawn for an element depend on the seed, the step, the parameter's number
    and the element's index in the whole parameter: each block of the parameter has draws of its own, of which a shard uses its
    part. Temporaries: about 30 bytes per element of one block.

    Args:
        parameters: parameters, or this rank's shards of them.
        lr: learning rate.
        betas: decay of the moments.
        eps: term in the denominator.
        weight_decay: decay of the weights.
        seed: seed of the draws.
        block: elements of a block; None for that of the device.

    Attributes:
        held: which elements each parameter holds, by its ``id``; a parameter without an entry is whole.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int = 0,
        block: int | None = None,
    ):
        self.seed, self.block = seed, block
        self.held = {id(parameter): held(number, parameter) for number, parameter in enumerate(parameters)}
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
                state["step"] += 1
                step, whole = int(state["step"]), self.held[id(parameter)]
                moments = (state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1))
                with flattened(parameter) as weight:
                    columns = (weight, parameter.grad.reshape(-1), *moments)
                    for part, block, start, size in _blocks(whole, self.block or block_size(parameter.device.type)):
                        with seeded(parameter.device, self.seed, step, whole.number, block):
                            bits = [
                                random_bits(size, parameter.device)[start : start + part.stop - part.start] for _ in range(3)
                            ]
                        _step_block([column[part] for column in columns], bits, step, group)


def _blocks(whole: Held, size: int) -> Iterator[tuple[slice, int, int, int]]:
    """Yields the parts of a parameter that this process holds: where, in which block, at which of its elements, and its size."""
    at = 0
    for first, length in whole.runs:
        end = first + length
        while first < end:
            block, start = divmod(first, size)
            count = min(size - start, end - first)
            yield slice(at, at + count), block, start, min(size, whole.size - block * size)
            at, first = at + count, first + count


def _step_block(columns: list[torch.Tensor], bits: list[torch.Tensor], step: int, group: dict[str, Any]) -> None:
    """Updates weights and moments; ``columns`` are weights, gradients, first and second moments, ``bits`` those of the rounding."""
    weight, gradient, first, second = columns
    rate, (beta1, beta2) = group["lr"], group["betas"]
    g, w = gradient.float(), weight.float()
    m = first.float().lerp_(g, 1 - beta1)
    v = second.float().mul_(beta2).addcmul_(g, g, value=1 - beta2)
    scale = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    w.mul_(1 - rate * group["weight_decay"]).addcdiv_(m, scale, value=-rate / (1 - beta1**step))
    for target, value, drawn in zip((weight, first, second), (w, m, v), bits, strict=True):
        round_stochastically_(target, value, drawn)


def block_size(device: str) -> int:
    """Number of elements that are converted to float32 at a time on a type of device."""
    return BLOCK_CPU if device == "cpu" else BLOCK_GPU


@contextlib.contextmanager
def flattened(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Context that yields ``tensor`` flattened: a writable view or, if not contiguous, a copy that is written back on exit."""
    whole = tensor.detach().contiguous()
    yield whole.view(-1)
    if not tensor.is_contiguous():
        tensor.copy_(whole)
