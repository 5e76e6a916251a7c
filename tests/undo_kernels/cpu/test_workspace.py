"""The workspace that a thread keeps, and the memory of gradients: what it holds does not show, it is reused and given back."""

import threading

import pytest
import torch
import undo_kernels
from undo_kernels.cpu import workspace as kept

from undo_core import ops


def gradients(rows, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    h, w, th, tw = ((torch.randn(n, 32, generator=generator) * 0.3).to(dtype) for n in (rows, 1031, rows, 1031))
    inputs = [h.requires_grad_(), w.requires_grad_()]
    loss = ops.linear_kl_div(*inputs, th, tw, plan="chunk")
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_what_it_held_does_not_show(rows, dtype):
    undo_kernels.release_workspace()
    fresh = gradients(rows, dtype)
    kept.workspace(1 << 20).fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(fresh, gradients(rows, dtype), strict=True))


def test_it_grows_stays_and_is_given_back():
    undo_kernels.release_workspace()
    small = kept.workspace(10).data_ptr()
    assert kept.workspace(5).data_ptr() == small and kept.workspace(5).shape == (5,)
    kept.workspace(1 << 22)
    largest = kept.workspace(10).untyped_storage().nbytes()
    assert largest == 4 << 22
    undo_kernels.release_workspace()
    assert kept.workspace(10).untyped_storage().nbytes() == 40


def test_threads_do_not_share_it():
    wanted, found = {rows: gradients(rows) for rows in (33, 48)}, {}

    def work(rows):
        found[rows] = [gradients(rows) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(rows,)) for rows in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows, results in found.items():
        assert len(results) == 20
        for result in results:
            for a, b in zip(wanted[rows], result, strict=True):
                assert torch.equal(a, b)  # the order of every sum is fixed


@pytest.fixture
def sizes():
    """A number of rows whose gradient is kept, and one below it."""
    undo_kernels.release_workspace()
    yield kept.LEAST_BYTES // (4 * 32), kept.LEAST_BYTES // (4 * 32) - 1
    undo_kernels.release_workspace()


def test_memory_of_a_gradient_is_reused_once_nothing_uses_it(sizes):
    shape = torch.Size((sizes[0], 32))
    first = kept.reusable(shape, torch.float32).fill_(1.0)
    place = first.data_ptr()
    part = first.detach()[1:]  # as autograd detaches a gradient, and a caller may keep a view
    del first
    assert kept.reusable(shape, torch.float32).data_ptr() != place
    assert part.eq(1.0).all()
    del part
    held = [kept.reusable(shape, torch.float32) for _ in range(2)]
    assert place in {one.data_ptr() for one in held} and len({one.data_ptr() for one in held}) == 2
    halves = kept.reusable(torch.Size((2 * sizes[0], 32)), torch.bfloat16)  # of the same size in bytes
    assert halves.dtype == torch.bfloat16 and halves.shape == (2 * sizes[0], 32)


def unused():
    return [memory for memories in kept._unused.values() for memory in memories]


def test_unused_memory_of_another_size_is_freed_first(sizes):
    for rows in (sizes[0], sizes[0] + 1, sizes[0] + 2):
        kept.reusable(torch.Size((rows, 32)), torch.float32)
        assert [one.nbytes for one in unused()] == [rows * 32 * 4]
    kept.reusable(torch.Size((sizes[1], 32)), torch.float32)  # malloc keeps it by itself
    assert len(unused()) == 1
    undo_kernels.release_workspace()
    assert not unused()


def test_memory_in_use_when_the_rest_is_released_is_freed_later(sizes):
    shape = torch.Size((sizes[0], 32))
    first = kept.reusable(shape, torch.float32)
    undo_kernels.release_workspace()
    second = kept.reusable(shape, torch.float32)
    del first
    assert not unused()
    del second
    assert len(unused()) == 1


def test_steps_write_their_gradient_into_the_same_memory(sizes):
    weight = torch.randn(sizes[0], 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))

    def step(index):
        ops.linear_cross_entropy(hidden[index], weight, torch.arange(16), plan="chunk").backward()
        return weight.grad

    wanted = []
    for index in (0, 1):
        wanted.append(step(index).clone())
        weight.grad = None
    undo_kernels.release_workspace()
    place = step(0).data_ptr()
    weight.grad = None
    unused()[0].fill_(255)  # NaN as float32
    again = step(1)
    assert again.data_ptr() == place, "adopted as it is, and written by the next step"
    assert torch.equal(again, wanted[1])
    summed = step(0)  # accumulation needs a second one
    assert summed.data_ptr() == place and len(unused()) == 1
    assert torch.equal(summed, wanted[1] + wanted[0])


def test_autograd_adds_to_a_gradient_in_its_place(sizes):
    weight = torch.randn(sizes[0], 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))

    def loss():
        return ops.linear_cross_entropy(hidden, weight, torch.arange(16), plan="chunk")

    loss().backward()
    alone, place = weight.grad.clone(), weight.grad.data_ptr()
    weight.grad = None
    other = weight.sum()  # before the loss, so that the backward pass reaches it after the loss, like a tied embedding
    (loss() + other).backward()
    assert weight.grad.data_ptr() == place
    assert torch.equal(weight.grad, alone + 1.0)
