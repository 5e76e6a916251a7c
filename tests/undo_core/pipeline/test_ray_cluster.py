"""A sweep on a Ray cluster of several nodes on this machine. Long: `make test-distributed`."""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stage_kinds import HELD, Counted, Together
from tiny_run import write_run

from undo_core.io.files import read_json
from undo_core.pipeline.ray_engine import RayEngine
from undo_core.pipeline.store import Store

pytestmark = pytest.mark.distributed_long

STEPS = 100  # of pretraining, so that a test can stop it
GRID = {"noise.beta": [0.1, 0.5]}


def begin(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "undo_core", "sweep", "sweep.yaml", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen, code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == code, said
    return said


def weights(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of the weights of every stage."""
    return {path.parent.name: read_json(path)["outputs"] for path in sorted(folder.glob("swept/stages/*/manifest.json"))}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The weights that the local engine makes."""
    folder = write_run(tmp_path_factory.mktemp("local"), steps=STEPS, grid=GRID)
    end(begin(folder))
    return weights(folder)


def start_node(cluster, tries: int = 5, **arguments):
    """Adds a node; Ray gives it 30 seconds, which are too few on a loaded machine."""
    try:
        return cluster.add_node(**arguments)
    except Exception:  # Ray raises a plain one if the node is not up in time; the last try's error is raised
        if tries == 1:
            raise
    return start_node(cluster, tries - 1, **arguments)


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    """A cluster whose first node has no place for a stage; each test adds nodes of its own."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        cluster = Cluster()
        start_node(cluster, num_cpus=0, include_dashboard=False, _system_config={"health_check_period_ms": 1000})
        yield cluster
        cluster.shutdown()


@pytest.fixture
def add(cluster) -> Iterator:
    """Adds nodes with so many places; they are removed after the test."""
    added = []

    def add(*places: int) -> None:
        added.extend(start_node(cluster, num_cpus=count) for count in places)
        cluster.nodes_by_raylet = {node.all_processes["raylet"][0].process.pid: node for node in added}

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)


@pytest.fixture
def engine(cluster, add, request) -> Iterator[RayEngine]:
    """Nodes with so many places, and a connection to them for stages of so many processes; by default two of one for one."""
    places, ranks = getattr(request, "param", ([1, 1], 1))
    add(*places)
    with RayEngine(cluster.address, cpus=1, ranks=ranks) as engine:
        yield engine


def appears(folder: Path, pattern: str) -> Path:
    """Waits for a file."""
    until = time.monotonic() + 900
    while not (found := list(folder.glob(pattern))):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found[0]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lines(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "lines").read_text().splitlines()]


@contextlib.contextmanager
def interrupted(store: Store, stage: Counted, kill: Callable[[int], None]) -> Iterator[None]:
    """Has the stage wait in the middle until ``kill`` was called with the process that builds it; then it goes on."""
    failed = []

    def interrupt() -> None:
        try:
            begun = appears(store.root, f".{stage.name}.partial/lines")
            while len(begun.read_text().splitlines()) < HELD:
                time.sleep(0.01)
            kill(int(begun.read_text().split()[2]))
        except BaseException as error:
            failed.append(error)
        finally:
            Path(stage.gate).write_text("go")

    thread = threading.Thread(target=interrupt)
    thread.start()
    yield
    thread.join()
    assert not failed, failed


def build(engine: RayEngine, store: Store, stages: list) -> tuple[list, list]:
    """Builds stages; returns those that were built, and those that failed with their errors."""
    finished, failed = [], []
    engine.build(store, stages, finished.append, lambda *failure: failed.append(failure))
    return finished, failed


def await_words(capfd, words: str) -> None:
    """Waits until a worker's words arrive, which Ray sends from time to time."""
    said, deadline = "", time.monotonic() + 60
    while words not in said:
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
        said += capfd.readouterr().out


def test_the_stage_of_a_killed_node_continues_on_another(tmp_path, cluster, engine, capfd):
    """A node that dies is found dead by Ray; on another node the stage continues after its last step."""
    store = Store(tmp_path / "stages")
    first = Counted(steps=6, gate=str(tmp_path / "gate"))
    last = Counted(steps=1, before=first)
    with interrupted(store, first, functools.partial(kill_node, cluster)):
        finished, failed = build(engine, store, [last])
    assert failed == [] and [stage.key for stage in finished] == [first.key, last.key]
    steps = lines(store.folder(first))
    assert [int(step) for step, *_ in steps] == list(range(6)) and len({process for _, _, process, _ in steps}) == 2
    await_words(capfd, "has ended; this process continues its work")


def kill_node(cluster, builder: int) -> None:
    """Kills the node of a process, and the processes that the node has started."""
    family = [builder]
    while family[-1] not in cluster.nodes_by_raylet:
        family.append(parent_of(family[-1]))
    cluster.remove_node(cluster.nodes_by_raylet[family.pop()], allow_graceful=False)
    for process in family:
        with contextlib.suppress(ProcessLookupError):  # it ends with its node
            os.kill(process, signal.SIGKILL)


@pytest.mark.parametrize("engine", [([2], 2), ([1, 1], 2)], indirect=True, ids=["one node", "two nodes"])
def test_several_processes_build_a_stage_together(tmp_path, engine, capfd):
    """A placement group with torchrun's launcher on each node; after a kill the stage begins again where it was."""
    store = Store(tmp_path / "stages")
    first, last = Counted(steps=1), Together(steps=6, gate=str(tmp_path / "gate"), before=Counted(steps=1))
    with interrupted(store, last, lambda rank: os.kill(rank, signal.SIGKILL)):
        finished, failed = build(engine, store, [last, Together(how="raise", before=first)])
    assert [stage.kind for stage in finished] == ["counted", "together"]
    ((stage, error),) = failed
    assert stage.how == "raise" and "half way" in str(error)
    steps = lines(store.folder(last))
    assert [int(step) for step, *_ in steps] == list(range(6)) and {count for *_, count in steps} == {"2"}
    assert len({process for _, _, process, _ in steps}) == 2
    await_words(capfd, "has ended; this process continues its work")
    until = time.monotonic() + 600
    while engine.ray.available_resources().get("CPU") != 2:  # the placement groups are removed
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.parametrize("engine", [([1, 1, 1], 2)], indirect=True, ids=["three nodes"])
def test_the_processes_of_a_killed_node_begin_again_on_others(tmp_path, cluster, engine):
    store = Store(tmp_path / "stages")
    stage = Together(steps=6, gate=str(tmp_path / "gate"))
    with interrupted(store, stage, functools.partial(kill_node, cluster)):
        assert build(engine, store, [stage]) == ([stage], [])
    steps = lines(store.folder(stage))
    assert [int(step) for step, *_ in steps] == list(range(6)) and {count for *_, count in steps} == {"2"}
    assert len({process for _, _, process, _ in steps}) == 2


@pytest.mark.parametrize("engine", [([2], 2)], indirect=True, ids=["one node"])
def test_a_lost_coordinator_leaves_its_places_to_the_next(tmp_path, engine):
    """The cluster has places for one group only, and Ray does not remove that of a task that was killed."""
    store = Store(tmp_path / "stages")
    stage = Together(steps=6, gate=str(tmp_path / "gate"))
    with interrupted(store, stage, lambda rank: kill_coordinator(stage)):
        assert build(engine, store, [stage]) == ([stage], [])
    assert [int(step) for step, *_ in lines(store.folder(stage))] == list(range(6))


def kill_coordinator(stage: Counted) -> None:
    """Kills the process that Ray names after the stage."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if command.read_bytes().startswith(f"ray::{stage.name}".encode()):
                os.kill(int(command.parent.name), signal.SIGKILL)
                return
    raise AssertionError("no coordinator")


def test_a_sweep_ends_with_the_bits_of_one_machine(tmp_path, cluster, add, local):
    folder = write_run(tmp_path, steps=STEPS, grid=GRID)
    add(1, 1)
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert weights(folder) == local and not list(folder.glob("swept/stages/.*"))
    assert len(list(folder.glob("swept/runs/*/results-seed0.json"))) == 2 and (folder / "swept/report/comparison.html").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("swept/**/*.json")}
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a second call does nothing"


def test_a_stopped_sweep_continues(tmp_path, cluster, add, local):
    add(2)
    folder = write_run(tmp_path, steps=STEPS, grid=GRID)
    sweep = begin(folder, "--engine=ray", f"--address={cluster.address}")
    appears(folder, "swept/stages/.pretrain-*.partial/log.jsonl")
    sweep.send_signal(signal.SIGKILL)
    end(sweep, -signal.SIGKILL)
    end(begin(folder, "--engine=ray", f"--address={cluster.address}"))
    assert weights(folder) == local


def test_a_failed_run_stops_no_other_and_too_small_a_cluster_is_refused(tmp_path, cluster, add):
    add(2)
    folder = write_run(tmp_path, runs=[{"name": "good"}, {"name": "bad", "pretrain.train.lr": 1e12}])
    address = f"--address={cluster.address}"
    said = end(begin(folder, "--engine=ray", address, "--cpus=3"), 2)
    assert "cpus, ranks: got 3 and 1, which do not fit the cluster" in said and not (folder / "swept").exists()
    said = end(begin(folder, "--engine=ray", address), 1)
    (line,) = [line for line in said.splitlines() if line.startswith("undo: failed: ")]
    assert line.startswith("undo: failed: bad, seed 0: bad: pretrain: DivergedError: ")
    assert [path.parent.name for path in folder.glob("swept/runs/*/results-seed0.json")] == ["good"]
