"""The random choices of a call, a function of its seed: sizes, dtypes, values, and where in memory a tensor lies."""

import math
import random

import torch

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
HARD = {"subnormal": 1e-40, "zero": 0.0, "infinite": math.inf, "suppressed": -math.inf, "NaN": math.nan}
PLACES = ("whole", "whole", "apart", "offset", "columns", "odd elements", "odd bytes")


class Draw:
    """A source of random choices that remembers what was chosen, for the message of a failure."""

    def __init__(self, seed):
        self.seed, self.said = seed, []
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def __str__(self):
        return f"seed {self.seed}: " + ", ".join(self.said)

    def choose(self, name, values):
        value = self.random.choice(values)
        self.said.append(f"{name} {value}")
        return value

    def often(self, share, name=""):
        happens = self.random.random() < share
        if name and happens:
            self.said.append(name)
        return happens

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def shares(self, *shape):
        return torch.rand(*shape, generator=self.generator)

    def spoiled(self, tensor, kind, share):
        """Returns the tensor with some elements replaced by a hard value; 16 bits round it."""
        return torch.where(self.shares(tensor.shape) < share, HARD[kind], tensor)

    def placed(self, name, tensor, places=PLACES):
        """Returns the same values in memory of another layout, or at an address that is no multiple of a vector's or even of an element's."""
        if not tensor.numel() or not tensor.ndim:
            return tensor
        place = self.choose(f"{name} lies", places)
        if place == "whole":
            return tensor.contiguous()
        if place == "apart":  # every second element of each dimension
            memory = torch.full([2 * size for size in tensor.shape], 7).to(tensor.dtype)
            view = memory[tuple(slice(None, None, 2) for _ in tensor.shape)]
        elif place == "offset":  # a part of something larger
            memory = torch.full([size + 3 for size in tensor.shape], 7).to(tensor.dtype)
            view = memory[tuple(slice(1, size + 1) for size in tensor.shape)]
        elif place == "columns":
            view = torch.empty_like(tensor.movedim(0, -1), memory_format=torch.contiguous_format).movedim(-1, 0)
        else:
            offset = tensor.itemsize if place == "odd elements" else 1
            memory = bytearray(tensor.numel() * tensor.itemsize + offset)
            view = torch.frombuffer(memory, dtype=tensor.dtype, offset=offset).view(tensor.shape)
        return view.copy_(tensor)


def bits(tensor):
    """The bytes of a tensor's elements, NaN included."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)
