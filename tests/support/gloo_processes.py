"""Processes that communicate by gloo, forked from this one, so that what is imported here they need not import again."""

import datetime
import multiprocessing
import tempfile

import torch
import torch._dynamo  # DTensor imports it at first use, which otherwise each process would do by itself
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


def forked(world, work, *arguments):
    """Runs ``work(mesh, *arguments)`` in ``world`` processes and returns whether any of them failed."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        every = [fork.Process(target=_join, args=(rank, world, f"{folder}/store", work, arguments)) for rank in range(world)]
        for process in every:
            process.start()
        for process in every:
            process.join()
    return any(process.exitcode for process in every)


def _join(rank, world, store, work, arguments):
    torch.set_num_threads(1)
    patience = datetime.timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=patience)
    work(init_device_mesh("cpu", (world,)), *arguments)
    dist.destroy_process_group()
