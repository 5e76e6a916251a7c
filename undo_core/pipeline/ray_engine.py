"""Builds stages on the machines of a Ray cluster, which share the working directory and the folder of the stages.

A stage is a Ray task that waits for the tasks of its inputs and takes a GPU. Ray starts the tasks of a lost machine again on others;
there the lock of the stage's folder is taken over, and the build continues from its last checkpoint. A stage that several processes
train takes a placement group and runs under torchrun's launcher in it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from undo_core.io.files import see_changes, write_text
from undo_core.io.progress import console
from undo_core.pipeline.launcher import RankKilledError, launch, sizes
from undo_core.pipeline.run import evaluation
from undo_core.pipeline.stage import Stage
from undo_core.pipeline.store import Store
from undo_core.pipeline.workers import Failed, Finished, missing_with_inputs, use_threads

RETRIES = 3  # a stage is started again this often after its process or machine was lost
PASSED_ON = ("UNDO_", "HF_", "TRANSFORMERS_", "NCCL_", "GLOO_")  # environment variables that the machines get from this process
LINGER = 180.0  # seconds that the other machines of a stage have to end after one has failed; Ray notices a lost one after about 70 s
LOOK = 30.0  # seconds after which a stage that waits for room looks whether the cluster has changed
REPLACED = 600.0  # seconds that a stage waits for machines without which the cluster has no room for it


@dataclass(frozen=True)
class Task:
    """A stage as a task of the cluster.

    Attributes:
        stage: the stage.
        after: keys of the stages that it reads and that other tasks build.
        ranks: number of processes that build it together.
    """

    stage: Stage
    after: tuple[str, ...]
    ranks: int


@dataclass(frozen=True)
class Place:
    """Where the tasks run.

    Attributes:
        folder: working directory.
        witness: a file in the shared folder of the stages.
        cpus: number of CPU threads of each process.
        gpus: number of GPUs of each process: 0 or 1.
    """

    folder: str
    witness: str
    cpus: int
    gpus: int

    def enter(self) -> None:
        """Prepares this process for a task.

        Raises:
            FileNotFoundError: this machine does not have the folders.
        """
        from transformers.utils.logging import disable_progress_bar

        for path in (self.folder, self.witness):
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"output: got {path}, which is not on {platform.node()}; wanted folders that all machines share"
                )
        os.chdir(self.folder)
        disable_progress_bar()
        os.environ["OMP_NUM_THREADS"] = str(self.cpus)
        use_threads(1)


def tasks_of(store: Store, stages: Iterable[Stage], ranks: int = 1) -> list[Task]:
    """Returns a task for each missing stage and each missing stage that it reads, inputs first.

    Args:
        store: store in which the stages are built.
        stages: stages to build.
        ranks: number of processes of each stage that several processes can build together.
    """
    missing = missing_with_inputs(store, stages)
    return [
        Task(
            stage,
            tuple(source.key for source in stage.inputs.values() if source.key in missing),
            ranks if stage.together else 1,
        )
        for stage in missing.values()
    ]


def installed() -> ModuleType:
    """Returns the package Ray.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ModuleNotFoundError(
            "engine: got ray, which is not installed; pip install 'undo-core[ray]', or use the engine local"
        )
    import ray

    return ray


def passed_on(variables: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables for the machines; no secrets, since Ray shows them to all who see its dashboard or logs."""
    return {name: value for name, value in variables.items() if name.startswith(PASSED_ON) and not name.endswith("TOKEN")}


def rooms(ray: ModuleType, cpus: int, gpus: int | None = None) -> tuple[list[int], int]:
    """Returns for how many processes each machine has room, busy places included, and the number of GPUs of a process.

    Args:
        ray: the package, connected to a cluster.
        cpus: CPU threads of each process.
        gpus: GPUs of each process; by default 1 if a machine has any, else 0.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(any(machine.get("GPU") for machine in machines)) if gpus is None else gpus
    return [int(min([m.get("CPU", 0) // cpus, *([m.get("GPU", 0)] if gpus else [])])) for m in machines], gpus


class RayEngine:
    """A connection to a Ray cluster; a context manager that ends it on exit.

    Args:
        address: address of the cluster; None for the one that RAY_ADDRESS names or that runs on this machine, else a new one of this
            machine alone.
        cpus: CPU threads of each process.
        ranks: number of processes of each stage that several processes can build together.
    """

    def __init__(self, address: str | None, cpus: int, ranks: int) -> None:
        self.ray, self.address, self.cpus, self.ranks = installed(), address, cpus, ranks

    def __enter__(self) -> RayEngine:
        self.ray.init(address=self.address, runtime_env={"env_vars": passed_on(os.environ)}, logging_level="warning")
        room, self.gpus = rooms(self.ray, self.cpus)
        if not sizes(self.ranks, room):
            self.ray.shutdown()
            raise ValueError(_no_room(self.cpus, self.ranks, room, self.gpus))
        return self

    def __exit__(self, *_: object) -> None:
        self.ray.shutdown()

    def build(self, store: Store, stages: Iterable[Stage], finished: Finished, failed: Failed) -> None:
        """Builds every missing stage, inputs first, as :func:`undo_core.pipeline.workers.run_stages` does on one machine."""
        store = Store(store.root.absolute())
        with self._place(store) as place:
            tasks, results = tasks_of(store, stages, self.ranks), dict[str, Any]()
            for task in tasks:
                inputs = [results[key] for key in task.after]
                if task.ranks == 1:
                    results[task.stage.key] = self._remote(_build, place).remote(place, store, task.stage, *inputs)
                else:
                    coordinate = self.ray.remote(_build_together).options(num_cpus=0, max_retries=RETRIES, name=task.stage.name)
                    results[task.stage.key] = coordinate.remote(place, store, task.stage, task.ranks, *inputs)
            waiting = {results[task.stage.key]: task for task in tasks}
            while waiting:
                done, _ = self.ray.wait(list(waiting))
                see_changes(store.root)
                for result in done:
                    task, error = waiting.pop(result), self._error(result)
                    if error is None:
                        finished(task.stage)
                    elif not any(self._error(results[key]) for key in task.after):  # else an input has failed, not this stage
                        failed(task.stage, error)

    def evaluate(self, store: Store, pairs: Sequence[tuple[Stage, Stage]]) -> None:
        """Evaluates models on prepared data, for the results; prints the errors."""
        store = Store(store.root.absolute())
        with self._place(store) as place:
            results = [self._remote(_evaluate, place).remote(place, store, *pair) for pair in pairs]
            for (stage, _), result in zip(pairs, results, strict=True):
                error = self._error(result)
                if error is not None:
                    console.print(f"  {stage.title}: not evaluated: {type(error).__name__}: {error}")
            see_changes(store.root)

    def _remote(self, function: Any, place: Place) -> Any:
        return self.ray.remote(function).options(num_cpus=place.cpus, num_gpus=place.gpus, max_retries=RETRIES)

    def _error(self, result: Any) -> Exception | None:
        """Waits for a task and returns its error; None if there is none."""
        try:
            self.ray.get(result)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except self.ray.exceptions.RayError as error:
            if isinstance(error, (self.ray.exceptions.WorkerCrashedError, self.ray.exceptions.NodeDiedError)):
                return ChildProcessError(f"its process or machine was lost {RETRIES + 1} times ({_said(error)})")
            return RuntimeError(f"Ray could not run it ({_said(error)})")
        return None

    @contextlib.contextmanager
    def _place(self, store: Store) -> Any:
        store.root.mkdir(parents=True, exist_ok=True)
        witness = store.root / f".sweep-{platform.node()}-{os.getpid()}"
        write_text(witness, "machines of the sweep look for this file\n")
        try:
            yield Place(os.getcwd(), str(witness), self.cpus, self.gpus)
        finally:
            witness.unlink()


def _build(place: Place, store: Store, stage: Stage, *inputs: None) -> None:
    """Builds a stage on this machine; ``inputs`` are the results of the tasks before it, for which Ray waits."""
    place.enter()
    store.ensure(stage)


def _evaluate(place: Place, store: Store, stage: Stage, prepared: Stage) -> None:
    place.enter()
    evaluation(store, stage, prepared)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _no_room(cpus: int, ranks: int, room: list[int], gpus: int) -> str:
    return (
        f"cpus, ranks: got {cpus} and {ranks}, which do not fit the cluster of {len(room)} machine(s) with "
        f"{', '.join(map(str, room))} place(s) for a process of {cpus} CPU(s)"
        + " and a GPU" * gpus
        + "; each machine that is used takes equally many processes" * (ranks > 1)
    )


def _build_together(place: Place, store: Store, stage: Stage, ranks: int, *inputs: None) -> None:
    """Builds a stage in several processes; begins again after the loss of one."""
    for attempt in range(RETRIES + 1):
        try:
            return _attempt(place, store, stage, ranks)
        except RankKilledError:
            if attempt == RETRIES:
                raise


def _reserve(ray: ModuleType, place: Place, name: str, ranks: int) -> tuple[Any, list[int]]:
    """Waits for a placement group and returns it, with the number of processes on each machine.

    Ray keeps the group of a coordinator that was lost, so one of the same name is removed first. The processes are divided anew if
    the cluster changes before it has room.

    Raises:
        ValueError: the cluster has lost machines, and nothing has replaced them.
    """
    from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group

    with contextlib.suppress(ValueError):  # so says Ray if there is none
        remove_placement_group(get_placement_group(name))
    until = time.monotonic() + REPLACED
    while True:
        room, _ = rooms(ray, place.cpus, place.gpus)
        parts = sizes(ranks, room)
        if parts:
            needed = [{"CPU": part * place.cpus, **({"GPU": part} if place.gpus else {})} for part in parts]
            group = placement_group(needed, strategy="STRICT_SPREAD" if len(parts) > 1 else "PACK", name=name)
            while sizes(ranks, rooms(ray, place.cpus, place.gpus)[0]) == parts:
                if group.wait(LOOK):  # other stages may need the places for long
                    return group, parts
            remove_placement_group(group)
            until = time.monotonic() + REPLACED
        elif time.monotonic() >= until:
            raise ValueError(_no_room(place.cpus, ranks, room, place.gpus))
        else:
            time.sleep(LOOK)


def _attempt(place: Place, store: Store, stage: Stage, ranks: int) -> None:
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group, parts = _reserve(ray, place, stage.name, ranks)
    try:

        def on(machine: int, function: Any, *arguments: Any, **amounts: float) -> Any:
            where = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=machine)
            return ray.remote(function).options(max_retries=0, scheduling_strategy=where, **amounts).remote(*arguments)

        endpoint = ray.get(on(0, _endpoint, num_cpus=place.cpus), timeout=LINGER)  # its machine may be lost by now
        launched = [
            on(
                machine,
                _launch,
                place,
                store,
                stage,
                part,
                len(parts),
                machine,
                endpoint,
                num_cpus=part * place.cpus,
                num_gpus=part * place.gpus,
            )
            for machine, part in enumerate(parts)
        ]
        _wait(ray, launched)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise RankKilledError(f"a machine was lost, or Ray could not use it ({_said(error)})") from None
    finally:
        remove_placement_group(group)  # ends what still runs in it


def _wait(ray: ModuleType, launched: list[Any]) -> None:
    """Waits for the machines of a stage.

    When one of them is lost, the processes of the others fail too, and perhaps sooner: the loss is what is raised then.
    """
    first, until = None, float("inf")
    while launched:
        done, launched = ray.wait(launched, timeout=None if first is None else max(0.0, until - time.monotonic()))
        if not done:
            break
        try:
            ray.get(done[0])
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, RankKilledError):
                raise error.cause from None
            if first is None:
                first, until = error.cause, time.monotonic() + LINGER
    if first is not None:
        raise first


def _endpoint() -> str:
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def _launch(place: Place, store: Store, stage: Stage, ranks: int, machines: int, machine: int, endpoint: str) -> None:
    place.enter()
    launch(store, stage, ranks=ranks, machines=machines, machine=machine, endpoint=endpoint, threads=place.cpus)
