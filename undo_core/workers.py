"""Running stages, side by side where they do not need each other."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.managers import SyncManager
from typing import Any

import torch

from undo_core.store import Stage, Store
from undo_core.training.progress import Board, Update, send_updates_to


def run_stages(store: Store, stages: Iterable[Stage], workers: int, finished: Callable[[Stage], None]) -> None:
    """Build every stage that is missing, inputs first; ``finished`` is called for each one that was built.

    With more than one worker each runs with its share of the processor's threads. A stage's bits can depend on the number of
    threads, so a run must be continued with the workers that it was begun with.
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
            store.ensure(stage)
            finished(stage)
    elif missing:
        _side_by_side(store, missing, workers, finished)


def use_threads(workers: int) -> None:
    """Give this process its share of the threads, and make what it computes repeatable."""
    torch.set_num_threads(max(1, _cores() // workers))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel in use writes before it reads


def _cores() -> int:
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return int(limit) if limit.isdigit() and int(limit) > 0 else len(os.sched_getaffinity(0))


def _side_by_side(store: Store, missing: dict[str, Stage], workers: int, finished: Callable[[Stage], None]) -> None:
    context = multiprocessing.get_context("spawn")
    manager = SyncManager(ctx=context)
    manager.start(_end_with, (os.getpid(),))
    board, updates = Board(), manager.Queue()
    waiting, running = dict(missing), dict[Future, Stage]()
    with manager, ProcessPoolExecutor(workers, context, _begin, (workers, updates, os.getpid())) as pool:
        try:
            while waiting or running:
                ready = [s for s in waiting.values() if all(store.done(source) for source in s.inputs.values())]
                for stage in ready[: workers - len(running)]:
                    running[pool.submit(_build, store, waiting.pop(stage.key))] = stage
                done, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                _drain(updates, board)
                for future in done:
                    stage = running.pop(future)
                    future.result()
                    finished(stage)
        except BaseException:
            for process in list(pool._processes.values()):
                process.kill()
            raise


def _drain(updates: Any, board: Board) -> None:
    while True:
        try:
            board.show(updates.get_nowait())
        except queue.Empty:
            return


def _end_with(parent: int) -> None:
    """End this process when ``parent``, which started it, does, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(workers: int, updates: Any, parent: int) -> None:
    """Set up a worker process."""
    from transformers.utils.logging import disable_progress_bar

    _end_with(parent)
    disable_progress_bar()
    use_threads(workers)

    def send(update: Update) -> None:
        updates.put(update)

    send_updates_to(send)


def _build(store: Store, stage: Stage) -> None:
    store.ensure(stage)
