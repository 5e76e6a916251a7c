"""Processes of one machine that build a stage together, started by torchrun's launcher."""

from __future__ import annotations

import logging
import os
import signal

from undo_core import distributed
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store
from undo_core.pipeline.workers import end_with, use_threads


class RankKilledError(RuntimeError):
    """A signal ended one of the processes."""


def launch(store: Store, stage: Stage, *, ranks: int, machines: int, machine: int, endpoint: str, threads: int) -> None:
    """Builds the stage in ``ranks`` processes of this machine, together with those of the other machines.

    Args:
        store: store in which the stage is built.
        stage: stage to build.
        ranks: number of processes on each machine.
        machines: number of machines.
        machine: number of this machine, from 0.
        endpoint: ``host:port`` at which machine 0 listens.
        threads: number of CPU threads of each process.

    Raises:
        RankKilledError: a signal ended a process.
        RuntimeError: a process failed; the text is its error.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=ranks,
        run_id=stage.name,
        rdzv_backend="static",
        rdzv_endpoint=endpoint,
        rdzv_configs={"rank": machine},
        max_restarts=0,
        monitor_interval=0.2,
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it logs of a failure is raised here
    try:
        elastic_launch(config, _rank)(store, stage, threads, os.getpid())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            ended = signal.Signals(-failure.exitcode).name
            raise RankKilledError(
                f"rank {rank} of {ranks * machines} was ended by {ended}, perhaps for lack of memory"
            ) from None
        told = failure.error_file_data["message"]  # written by torch's launcher
        raise RuntimeError(told["message"] if isinstance(told, dict) else told) from None


def sizes(ranks: int, rooms: list[int]) -> list[int]:
    """Divides processes among as few machines as possible, equally many on each.

    Args:
        ranks: number of processes.
        rooms: number of processes for which each machine of the cluster has room.

    Returns:
        Number of processes on each machine that is used; empty if the cluster has no room for them.
    """
    for machines in range(1, ranks + 1):
        each = ranks // machines
        if each * machines == ranks and sum(room >= each for room in rooms) >= machines:
            return [each] * machines
    return []


def _rank(store: Store, stage: Stage, threads: int, launcher: int) -> None:
    """Builds the stage as one of the processes."""
    end_with(launcher)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    use_threads(1)
    distributed.start()
    stage.check_ranks(distributed.count())
    store.ensure(stage)
    distributed.stop()  # not after an error: the other ranks may wait in a collective, and this process must end for them to end
