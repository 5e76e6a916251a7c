"""The memory that an interpreted Triton kernel touches: every address is compared with the tensors of its launch."""

import contextlib

import numpy as np
import torch
from triton.runtime import interpreter


class OutOfBounds(AssertionError):
    """A kernel read or wrote where none of its tensors lies."""


def span(tensor):
    """Returns the first address of a tensor's elements and the one behind the last."""
    last = (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from _tensors(one)


@contextlib.contextmanager
def watched(*more):
    """Inside, a kernel fails that leaves its tensors; ``more`` are tensors whose addresses it reads from a table. Yields their launches.

    Tensors that lie next to each other in one storage are not told apart; a border between them is, see :func:`bordered`.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, begin = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    begins, ends, launches = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)], []

    def begin_launch(self, args, kwargs):
        given = [*_tensors(tuple(args)), *_tensors(tuple(kwargs.values())), *more]
        spans = sorted(span(tensor) for tensor in given)
        merged = spans[:1]
        for first, end in spans[1:]:
            if first < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((first, end))
        begins[0], ends[0] = (np.array(side, np.uint64) for side in zip(*merged, strict=True))
        launches.append(self.fn.__name__)
        return begin(self, args, kwargs)

    def check(way, pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        at = at[np.broadcast_to(mask.data, at.shape).astype(bool)].astype(np.uint64)
        place = np.searchsorted(begins[0], at, side="right") - 1
        wrong = (place < 0) | (at + np.uint64(size) > ends[0][place])
        if wrong.any():
            raise OutOfBounds(f"{launches[-1]} {way} {int(wrong.sum())} elements of {size} bytes outside its tensors")

    def checked_load(self, pointers, mask, *others):
        check("reads", pointers, mask)
        return load(self, pointers, mask, *others)

    def checked_store(self, pointers, value, mask, *others):
        check("writes", pointers, mask)
        return store(self, pointers, value, mask, *others)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    executor._init_args_hst = begin_launch
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        executor._init_args_hst = begin


class Bordered:
    """Tensors inside larger ones, whose other elements are NaN or the smallest integers, and must stay so."""

    def __init__(self):
        self.memory = []

    def __call__(self, tensor):
        """Returns the same values between borders, three elements on each side of each dimension."""
        poison = (
            torch.nan if tensor.is_floating_point() else True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).min
        )
        memory = torch.full([size + 6 for size in tensor.shape], poison, dtype=tensor.dtype)
        view = memory[tuple(slice(3, 3 + size) for size in tensor.shape)]
        view.copy_(tensor)
        self.memory.append((memory, view, memory.clone()))
        return view

    def assert_whole(self):
        """Fails if anything but the tensors themselves has changed."""
        for memory, view, before in self.memory:
            inside = view.clone()
            view.copy_(before[tuple(slice(3, 3 + size) for size in view.shape)])
            assert torch.equal(memory.nan_to_num(7.0), before.nan_to_num(7.0)), "a border was written to"
            view.copy_(inside)
