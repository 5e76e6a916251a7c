"""Worker processes that build independent stages in parallel."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from undo_core import distributed
from undo_core.io.files import errors_named
from undo_core.io.locks import interrupt_if_lost
from undo_core.io.memory_use import keep_freed_memory
from undo_core.io.progress import Board, send_updates_to, show_every_character
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store, threads_of_a_worker

Finished = Callable[[Stage], None]
Failed = Callable[[Stage, Exception], None]
_INTERRUPT, _MASKS = {signal.SIGINT}, hasattr(signal, "pthread_sigmask")  # Windows has none


def run_stages(store: Store, stages: Iterable[Stage], workers: int, finished: Finished, failed: Failed | None = None) -> None:
    """Builds every missing stage, inputs first.

    Each of several workers gets an equal share of the CPU threads and, in turn, one of the visible GPUs. The bits of a result
    can depend on the number of threads, so a run must be continued with the number of workers that it was started with.

    Args:
        store: store in which the stages are built.
        stages: stages to build, with their inputs.
        workers: number of processes; 1 builds in this process.
        finished: called with each stage that was built.
        failed: called with each stage that failed and its error; stages that do not read it are still built. None raises the
            first error.
    """
    missing = distributed.on_first(lambda: missing_with_inputs(store, stages))
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


def missing_with_inputs(store: Store, stages: Iterable[Stage]) -> dict[str, Stage]:
    """Returns the stages that are missing, and those missing that they read, by key; inputs come first."""
    missing: dict[str, Stage] = {}

    def collect(stage: Stage) -> None:
        if not store.done(stage):
            for source in stage.inputs.values():
                collect(source)
            missing.setdefault(stage.key, stage)

    for stage in stages:
        collect(stage)
    return missing


def gpus() -> list[str]:
    """The visible GPUs, each as a value for ``CUDA_VISIBLE_DEVICES``."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if named is None else named.replace(" ", "").split(",")[:count]


def use_threads(workers: int) -> None:
    """Limits this process to its share of the CPU threads, and makes its results deterministic."""
    torch.set_num_threads(threads_of_a_worker(workers))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # every kernel in use writes before it reads


def _ready(store: Store, stage: Stage) -> bool:
    return all(store.done(source) for source in stage.inputs.values())


def _can_begin(store: Store, stage: Stage) -> bool:
    """Whether only late inputs are missing."""
    return all(name in stage.late or store.done(source) for name, source in stage.inputs.items())


def _readers(stage: Stage, stages: Iterable[Stage]) -> set[str]:
    """Keys of those of ``stages``, of which inputs come first, that read ``stage``, directly or through others."""
    found = {stage.key}
    for other in stages:
        if any(isinstance(source, Stage) and source.key in found for source in other.inputs.values()):
            found.add(other.key)
    return found - {stage.key}


def _side_by_side(store: Store, missing: dict[str, Stage], workers: int, finished: Finished, failed: Failed | None) -> None:
    """Builds ``missing``, inputs first, in ``workers`` processes.

    Each worker is a pool of one process with its own pipe for progress, so that a killed worker fails only its own stage and
    holds no lock that another one needs. A worker that would have nothing to do begins a stage that lacks only late inputs; one
    worker never does, so that these are built.
    """
    context = multiprocessing.get_context("spawn")
    board, devices = Board(), gpus()
    pools, pipes, free = dict[int, ProcessPoolExecutor](), dict[int, Connection](), list(range(workers))
    waiting, running = dict(missing), dict[Future, tuple[Stage, int]]()
    given_up = set[str]()  # keys of stages that were begun and whose late input has failed

    def start(worker: int) -> None:
        pipes[worker], sender = context.Pipe(duplex=False)
        stack.callback(pipes[worker].close)
        with sender, _inherited(devices[worker % len(devices)] if devices else None):
            with errors_named(Path("/dev/shm")):  # where the system keeps the pool's semaphores
                pool = ProcessPoolExecutor(1, context, _begin, (workers, sender, os.getpid()))
            pools[worker] = stack.enter_context(pool)
            pools[worker].submit(os.getpid)  # starts the process

    def end(worker: int) -> None:
        pipes.pop(worker, None)
        if worker in pools:
            _kill(pools.pop(worker))

    def give_up_readers(failure: Stage) -> None:
        readers = _readers(failure, missing.values())
        for key in readers:
            waiting.pop(key, None)
        for stage, worker in running.values():
            if stage.key in readers:
                given_up.add(stage.key)
                end(worker)

    with contextlib.ExitStack() as stack:
        try:
            for worker in free[: len(missing)]:
                start(worker)  # a process imports for seconds, so one that is needed later does it beside the first stage
            while waiting or running:
                ready = [stage for stage in waiting.values() if _ready(store, stage)]
                if not ready and all(stage.late and not _ready(store, stage) for stage, _ in running.values()):
                    for _, worker in running.values():
                        end(worker)
                    break  # someone has removed a folder that the remaining stages read
                ahead = sum(not _ready(store, stage) for stage, _ in running.values())
                early = [stage for stage in waiting.values() if stage not in ready and _can_begin(store, stage)]
                for stage in [*ready, *early[: max(0, workers - 1 - ahead)]][: len(free)]:
                    worker = min(free, key=lambda worker: worker not in pools)  # those that run need not be started
                    free.remove(worker)
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
                    if isinstance(error, BrokenProcessPool):
                        end(worker)
                    if error is None:
                        finished(stage)
                    elif stage.key in given_up:
                        continue
                    elif failed is None or not isinstance(error, Exception):
                        raise error
                    else:
                        failed(stage, error)
                        give_up_readers(stage)
        except BaseException:
            for pool in pools.values():
                _kill(pool)
            raise


def _kill(pool: ProcessPoolExecutor) -> None:
    for process in list((pool._processes or {}).values()):
        process.kill()


@contextlib.contextmanager
def _inherited(device: str | None) -> Iterator[None]:
    """What a process that starts inside the block inherits.

    It sees only this GPU, or all of them if it is None; it imports no file of the current folder in place of a module of Python; and it
    leaves Ctrl-C, which a terminal sends to all processes, to the one that started it, also while it imports.
    """
    values = {"PYTHONSAFEPATH": "1"} | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    before = {name: os.environ.get(name) for name in values}
    blocked = None
    os.environ.update(values)
    try:
        if _MASKS:
            resource_tracker.ensure_running()  # a process of multiprocessing; to start it unblocks interrupts
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _INTERRUPT)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _drain(pipe: Connection, board: Board) -> None:
    """Shows a worker's progress updates; ignores the end of file, perhaps within an update, that a killed worker leaves."""
    with contextlib.suppress(EOFError):
        while pipe.poll():
            board.show(pipe.recv())


def end_with(parent: int) -> None:
    """Ends this process as soon as ``parent``, the process that started it, has ended for any reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _begin(workers: int, updates: Connection, parent: int) -> None:
    """Sets up a worker process."""
    from transformers.utils.logging import disable_progress_bar

    end_with(parent)
    signal.signal(signal.SIGINT, interrupt_if_lost)
    if _MASKS:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _INTERRUPT)
    disable_progress_bar()
    show_every_character()
    keep_freed_memory()
    use_threads(workers)

    send_updates_to(updates.send)


def _build(store: Store, stage: Stage) -> None:
    store.ensure(stage, awaited=True)
