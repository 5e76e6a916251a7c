"""Runs a function on several processes of one run, forked from this one, so that they need not import anything again."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls ``function(*arguments)`` on ``count`` ranks that communicate by gloo, and returns their results.

    Call it from a process that has not computed with several threads yet: forked threads do not exist.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [context.Process(target=_work, args=(rank, count, port, results, function, arguments)) for rank in range(count)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    while len(found) < count:
        rank, value, error = pickle.loads(results.get())
        if error is not None:
            for process in processes:
                process.kill()
            raise AssertionError(f"rank {rank} of {count} failed:\n{error}")
        found[rank] = value
    for process in processes:
        process.join()
    return [found[rank] for rank in range(count)]


def _work(rank: int, count: int, port: int, results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    from undo_core import distributed

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        distributed.start()
        value = function(*arguments)
        distributed.stop()
        results.put(pickle.dumps((rank, value, None)))  # a queue would share a tensor's memory with a process that ends
    except BaseException:
        results.put(pickle.dumps((rank, None, traceback.format_exc())))
