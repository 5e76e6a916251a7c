"""The workspace that a thread keeps: what it holds does not show, it grows, it can be given back."""

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
