"""Workers: processes that build stages in parallel where one does not read the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

import torch

from undo_core.io.progress import Board, send_updates_to
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store, usable_cores

Finished = Callable[[Stage], None]
Failed = Callable[[Stage, Exception], None]


def run_stages(store: Store, stages: Iterable[Stage], workers: int, finished: Finished, failed: Failed | None = None) -> None:
    """Build every stage that is missing, inputs first; ``finished`` is called for each one that was built.

    With more than one worker each runs with its share of the processor's threads and, in turn, on one of the GPUs at hand. A stage's
    bits can depend on the number of threads, so a run must be continued with the workers that it was begun with.

    Args:
        store: where the stages are built.
        stages: wanted, with their inputs.
        workers: processes; one builds in this process.
        finished: told of each stage that was built.
        failed: told of each stage that was not, and why; the others go on but for those that read it. None raises at the first.
    """
    missing: dict[str, Stage] = {}

    def collect(stage: Stage) -> None:
        if not store.done(stage):
            for source in stage.inputs.values():
                collect(source)
            missing.setdefault(stage.key, stage)

    for stage in stages:
        collect(stage)
    if workers == 1:
        use_threads(1)
        for stage in missing.values():
            if failed is not None and not _ready(store, stage):
                continue
            try:
                store.ensure(stage)
            except Exception as error:
                if failed is None:
                    raise
                failed(stage, error)
            else:
                finished(stage)
    elif missing:
        _side_by_side(store, missing, workers, finished, failed)


def gpus() -> list[str]:
    """The visible GPUs, each as a value for ``CUDA_VISIBLE_DEVICES``."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if named is None else named.replace(" ", "").split(",")[:count]


def use_threads(workers: int) -> None:
    """Give this process its share of the threads, and make what it computes repeatable."""
    torch.set_num_threads(max(1, _cores() // workers))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel in use writes before it reads


def _cores() -> int:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else usable_cores()


def _ready(store: Store, stage: Stage) -> bool:
    return all(store.done(source) for source in stage.inputs.values())


def _side_by_side(store: Store, missing: dict[str, Stage], workers: int, finished: Finished, failed: Failed | None) -> None:
    """Build ``missing`` in ``workers`` processes.

    Each worker is a pool of one process with a pipe of its own for progress, so that a worker that is killed fails only its own stage
    and holds no lock that another one needs.
    """
    context = multiprocessing.get_context("spawn")
    board, devices = Board(), gpus()
    pools, pipes, free = dict[int, ProcessPoolExecutor](), dict[int, Connection](), list(range(workers))
    waiting, running = dict(missing), dict[Future, tuple[Stage, int]]()

    def start(worker: int) -> None:
        pipes[worker], sender = context.Pipe(duplex=False)
        stack.callback(pipes[worker].close)
        with sender, _visible(devices[worker % len(devices)] if devices else None):
            pools[worker] = stack.enter_context(ProcessPoolExecutor(1, context, _begin, (workers, sender, os.getpid())))
            pools[worker].submit(os.getpid)  # starts the process, with this environment

    with contextlib.ExitStack() as stack:
        try:
            while waiting or running:
                ready = [stage for stage in waiting.values() if _ready(store, stage)]
                if not ready and not running:
                    break  # what is left reads a stage that failed
                for stage in ready[: len(free)]:
                    worker = free.pop(0)
                    if worker not in pools:
                        start(worker)
                    running[pools[worker].submit(_build, store, waiting.pop(stage.key))] = stage, worker
                done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for pipe in pipes.values():
                    _drain(pipe, board)
                for future in done:
                    stage, worker = running.pop(future)
                    free.append(worker)
                    error = future.exception()
                    if error is None:
                        finished(stage)
                    elif failed is None or not isinstance(error, Exception):
                        raise error
                    else:
                        failed(stage, error)
                        if isinstance(error, BrokenProcessPool):
                            del pools[worker], pipes[worker]
        except BaseException:
            for pool in pools.values():
                for process in list((pool._processes or {}).values()):
                    process.kill()
            raise


@contextlib.contextmanager
def _visible(device: str | None) -> Iterator[None]:
    """Let processes that start inside the block see only this GPU; None changes nothing."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif device is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]


def _drain(pipe: Connection, board: Board) -> None:
    """Show what a worker has sent. A worker that was killed has left an end of file, perhaps in the middle of an update."""
    with contextlib.suppress(EOFError):
        while pipe.poll():
            board.show(pipe.recv())


def _end_with(parent: int) -> None:
    """End this process as soon as ``parent``, which started it, has ended for whatever reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(workers: int, updates: Connection, parent: int) -> None:
    """Set up a worker process."""
    from transformers.utils.logging import disable_progress_bar

    _end_with(parent)
    disable_progress_bar()
    use_threads(workers)

    send_updates_to(updates.send)


def _build(store: Store, stage: Stage) -> None:
    store.ensure(stage)
