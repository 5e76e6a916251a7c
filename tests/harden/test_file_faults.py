"""At each kind of operation on a file, a run fails or ends; the same command then ends with the same bits. So it does on a sick machine."""

import errno
import itertools
import random
import re
import resource
import shutil
import socket
import time
from pathlib import Path

import pytest
from faulty_files import ERRORS, Fault
from faulty_runs import FURTHER, RESULTS, Finished, check_end, live, shortest_run, strike
from stage_kinds import KINDS

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the faults find the path of a handle in /proc")
EVERY = 1_000_000  # more than there are operations

# Between them they build every kind of stage of a run.
RUNS = {
    "plain": shortest_run(),
    "cached": shortest_run(
        distill={"recover": None, "teacher": {"kind": "cached"}, "train": {"steps": 2, "batch_size": 4}}, **FURTHER
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns a finished run by name; each is run once."""
    made = {}

    def get(name: str) -> Finished:
        if name not in made:
            made[name] = Finished.new(tmp_path_factory.mktemp("faults") / name, RUNS[name])
        return made[name]

    return get


def unlike(operations: list[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Numbers, kinds and paths of operations; of those alike, such as the steps of a loop, the first two and the last.

    Two are alike if they and those before them are of the same kind, on paths that differ in digits only.
    """
    alike, before = dict[tuple, list[int]](), None
    for number, (kind, path) in enumerate(operations):
        now = kind, re.sub(r"\d+", "#", path)
        alike.setdefault((before, now), []).append(number)
        before = now
    return [
        (number, *operations[number]) for number in sorted({n for found in alike.values() for n in (*found[:2], found[-1])})
    ]


def possible(number: int, kind: str, path: str, stage: str) -> list[Fault]:
    """The faults that are tried at an operation: the end of the process, and one error, another one at the next operation.

    The results, which each run of the command writes, have their own turn; a process that ends while it reads has ended before.
    """
    if stage != RESULTS and not path.startswith("stages"):
        return []
    errors = [Fault(number, error) for error in ERRORS if Fault(number, error).hits(number, kind)]
    return ([] if kind == "read" else [Fault(number, None)]) + errors[number % len(errors) :][:1]


@pytest.mark.parametrize("what", ["process ends", "operation fails"])
@pytest.mark.parametrize("name", RUNS)
def test_a_fault_at_any_operation(name, what, finished, tries, account, tmp_path):
    every = tries(1 if name == "plain" else 0, EVERY) > 1
    run = finished(name)
    kinds = {stage.split("-")[0] for stage in run.stages()} - {RESULTS}
    assert name == "plain" or kinds == {kind.kind for kind in KINDS} - {"replay"}, "a kind is never struck"
    known = run.stages() if every else [run.stages()[-2]]
    faults = [
        (stage, fault)
        for stage in known
        for number, kind, path in unlike(live(run.without(stage, tmp_path / "count")).files.operations)
        for fault in possible(number, kind, path, stage)
        if (fault.error is None) == (what == "process ends")
    ]
    chosen = random.Random(1).sample(faults, tries(1, len(faults)))
    survived = [strike(run, stage, tmp_path / "struck", fault) for stage, fault in chosen]
    account(f"{what} at a file operation", tried=len(survived), survived=sum(survived), refused=survived.count(False))


@pytest.fixture(scope="module")
def interrupted(finished, tmp_path_factory):
    """Returns a copy of a run whose distillation was killed after its first checkpoint, and which still holds the lock."""
    run, folder = finished("plain"), tmp_path_factory.mktemp("interrupted") / "run"
    stage = next(name for name in run.stages() if name.startswith("distill"))
    operations = live(run.without(stage, folder)).files.operations
    saved = next(i for i, (kind, path) in enumerate(operations) if kind == "rename" and path.endswith("checkpoint/step-1"))
    place = run.without(stage, folder)
    assert live(place, Fault(saved + 3, None)).code is None
    assert list(place.glob("out/stages/.*.lock.*")) and list(place.glob("out/stages/.*.partial/checkpoint/step-1"))
    return place


def set_back(place: Path, patch: pytest.MonkeyPatch) -> Path:
    now = itertools.count(10**9, -1)
    patch.setattr(time, "time", lambda: float(next(now)))
    for path in place.rglob("*"):
        path.touch()  # by the clock as it was before
    return place


def renamed(place: Path, patch: pytest.MonkeyPatch) -> Path:
    patch.setattr(socket, "gethostname", lambda: "renamed")
    return place


def moved(place: Path, patch: pytest.MonkeyPatch) -> Path:
    return Path(shutil.move(place, place.with_name("elsewhere")))


@pytest.mark.parametrize("change", [set_back, renamed, moved])
def test_what_changes_between_two_runs(change, finished, interrupted, account, tmp_path, monkeypatch):
    run = finished("plain")
    place = change(Path(shutil.copytree(interrupted, tmp_path / "first")), monkeypatch)
    life = live(place)
    assert life.code == 0, life.said
    run.compare(place, change.__name__)
    names = {set_back: "clock set back", renamed: "host renamed", moved: "folder moved"}
    account(names[change], tried=1, survived=1)


LIMITS = {
    "size of a file": (resource.RLIMIT_FSIZE, lambda room: room, [0, 300, 3_000, 20_000]),
    "open files": (
        resource.RLIMIT_NOFILE,
        lambda room: max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + room,
        [1, 2, 3, 5],
    ),
}


@pytest.mark.parametrize("what", LIMITS)
def test_a_limit_of_the_system(what, finished, some, account, tmp_path):
    run = finished("plain")
    limit, value, rooms = LIMITS[what]
    tried = some([(stage, room) for stage in run.stages() for room in rooms], 1)
    for stage, room in tried:
        place, before = run.without(stage, tmp_path / "limited"), resource.getrlimit(limit)
        resource.setrlimit(limit, (value(room), before[1]))
        try:
            life = live(place)
        finally:
            resource.setrlimit(limit, before)
        check_end(life, f"{what}: {room} for {stage}")
        run.check_published(place, f"{what}: {room} for {stage}")
        again = live(place)
        assert again.code == 0, again.said
        run.compare(place, f"{what}: {room} for {stage}")
    account(f"limit of the system: {what}", tried=len(tried), survived=len(tried))


def test_a_disk_that_stays_read_only_is_named_and_not_the_lock(finished, tmp_path):
    """The lock cannot be given up there, which must not be what the user reads."""
    run = finished("plain")
    stage = run.stages()[0]
    operations = live(run.without(stage, tmp_path / "struck")).files.operations
    number = next(i for i, (kind, path) in enumerate(operations) if kind == "rename" and path.endswith("description.json"))
    life = live(run.without(stage, tmp_path / "struck"), Fault(number, errno.EROFS))
    assert life.code == 1 and "description.json" in life.said and "lock" not in life.said
