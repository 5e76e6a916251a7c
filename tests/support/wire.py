"""Counts what the collectives of this process move, from the operations that torch dispatches."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode

# The operations of torch.distributed that gloo and NCCL run, and the argument that is the collective's whole tensor.
KINDS = {
    "c10d._allgather_base_": ("all_gather", 0),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.allreduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", None),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
}


class CountCollectives(TorchDispatchMode):
    """Counts the collectives inside the ``with`` block: ``found[kind, bytes of the whole tensor]`` is the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[tuple[str, int]] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func._schema.name).replace("::", ".")
        if name in KINDS:
            kind, place = KINDS[name]
            tensors = result if place is None else args[place]
            for tensor in tensors if isinstance(tensors, (list, tuple)) else [tensors]:
                self.found[kind, tensor.numel() * tensor.element_size()] += 1
        elif name.startswith(("c10d.", "_c10d_functional.")) and name.rpartition(".")[2] not in ("wait_tensor", "barrier"):
            raise AssertionError(f"{name} moves data and is not counted")
        return result
