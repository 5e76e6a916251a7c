"""Counts what the collectives of this process move."""

import collections

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that torch dispatches, and the argument that is the collective's whole tensor; None for the result.
KINDS = {
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
}
ELSEWHERE = ("c10d.allreduce_", "c10d.barrier", "_c10d_functional.wait_tensor")


class CountCollectives(TorchDispatchMode):
    """Counts the collectives inside the ``with`` block: ``found[kind, bytes of the whole tensor]`` is the number of calls.

    All-reduces are counted where they are called: torch dispatches none of what runs inside a custom operation to a mode.
    Operations in ``ignored``, such as those by which ranks agree on small objects, are not counted.
    """

    def __init__(self, ignored: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.ignored = (*ELSEWHERE, *ignored)
        self.found: collections.Counter[tuple[str, int]] = collections.Counter()

    def __enter__(self):
        self.original = dist.all_reduce

        def all_reduce(tensor, *arguments, **named):
            self.found["all_reduce", tensor.numel() * tensor.element_size()] += 1
            return self.original(tensor, *arguments, **named)

        dist.all_reduce = all_reduce
        return super().__enter__()

    def __exit__(self, *error):
        dist.all_reduce = self.original
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.replace("::", ".")
        if name in KINDS:
            kind, place = KINDS[name]
            tensor = result if place is None else args[place]
            self.found[kind, tensor.numel() * tensor.element_size()] += 1
        elif name.startswith(("c10d.", "_c10d_functional.")) and name not in self.ignored:
            raise AssertionError(f"{name} moves data and is not counted")
        return result
