"""Runs a function on several processes of one run, forked from this one, so that what is imported here they need not import again."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor

from undo_core import distributed


def on_ranks(count: int, function: Callable[..., Any], *arguments: Any, kill: bool = True) -> list[Any]:
    """Calls ``function(*arguments)`` on ``count`` ranks that communicate by gloo, and returns their results.

    Args:
        count: number of ranks.
        function: called on each rank.
        arguments: its arguments.
        kill: whether the other ranks are killed when one has failed; otherwise they must end by themselves.

    Raises:
        AssertionError: a rank raised an error or died.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    for rank in range(count):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_work, args=(rank, count, port, sender, function, arguments)))
        processes[-1].start()
        sender.close()
        pipes.append(receiver)
    results: dict[int, Any] = {}
    try:
        while len(results) < count:
            for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in results]):
                rank = pipes.index(pipe)
                try:
                    value, error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    value, error = None, "it died"
                assert error is None, f"rank {rank} of {count} failed:\n{error}"
                results[rank] = value
    finally:
        for process in processes:
            if kill and len(results) < count:
                process.kill()
            process.join()
    return [results[rank] for rank in range(count)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _work(
    rank: int, count: int, port: int, answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # the threads of the process that was forked do not exist here
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        distributed.start()
        value = function(*arguments)
        distributed.stop()
        answer.send_bytes(pickle.dumps((value, None)))  # torch's own pickling would share the memory of a process that ends
    except BaseException:
        answer.send_bytes(pickle.dumps((None, traceback.format_exc())))
