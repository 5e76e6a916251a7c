"""Real processes are killed at random moments of every kind of stage, in every mode; the same command ends with the same bits."""

import random
import shutil
import time
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml
from faulty_runs import FURTHER, Finished, contents, shortest_run
from fork_server import ForkServer, kill, session

RUN, SWEEP = ["run", "run.yaml"], ["sweep", "sweep.yaml"]
GRID = {"name": "small", "base": "run.yaml", "output": "out", "workers": 1, "grid": {"noise.alphas": [[0.3], [0.6]]}}
TRAINED = ("pretrain", "unlearn", "distill", "relearn")
TEACHERS = ("cache", "distill")
IN_GLIBC = "cannot allocate memory for thread-local data: ABORT\n"  # which then ends the process itself


def trained(**settings):
    """A run in which every training has these settings."""
    run = shortest_run()
    for part in (run["pretrain"], run["unlearn"], run["distill"]):
        part["train"] |= settings
    run["relearn"] |= {name: value for name, value in settings.items() if name == "precision"}
    return run


def taught(**teacher):
    return shortest_run(distill={**shortest_run()["distill"], "teacher": teacher})


MODES = {  # the settings, the kinds of stages that are killed, and how the command is run
    "float32": (shortest_run(), ("prepare", *TRAINED, "noise", "results"), {}),
    "bfloat16-master": (trained(precision="bfloat16-master"), TRAINED, {}),
    "bfloat16-stochastic": (trained(precision="bfloat16-stochastic"), TRAINED, {}),
    "bfloat16": (trained(precision="bfloat16"), TRAINED, {}),
    "adamw-8bit": (trained(optimizer="adamw-8bit"), TRAINED[:-1], {}),
    "adamw-4bit": (trained(optimizer="adamw-4bit"), TRAINED[:-1], {}),
    "sgd": (trained(optimizer="sgd"), TRAINED[:-1], {}),
    "adafactor": (trained(optimizer="adafactor"), TRAINED[:-1], {}),
    "cached teacher": (taught(kind="cached"), TEACHERS, {}),
    "topk teacher": (taught(kind="topk", k=4), TEACHERS, {}),
    "streamed teacher": (taught(kind="streamed"), TEACHERS[1:], {}),
    "adapters": (shortest_run(relearn={**shortest_run()["relearn"], "kind": "lora"}), ("relearn",), {}),
    "controls, attacks and measures": (
        shortest_run(**FURTHER),
        ("initialise", "gate", "damage", "probe", "grid", "intervene", "search", "measure", "untie", "erase"),
        {},
    ),
    "two workers": (shortest_run(workers=2), TRAINED, {}),
    "sweep": (shortest_run(), ("unlearn", "relearn"), {}),
    "two ranks": (shortest_run(), TRAINED, {"ranks": 2}),
}


@pytest.fixture(scope="module")
def server():
    with ForkServer() as server:
        yield server


def run(server, folder, arguments, how, after=None, choose=random.choice):
    """Runs a command; kills one of its processes after some seconds, and returns how it ended."""
    started = server.start(folder, arguments, **how)
    if after is not None:
        time.sleep(after)
        kill(choose(started))
    return server.wait()


def finish(server, folder, settings, arguments=RUN, how=MappingProxyType({})):
    """Returns a finished run."""
    folder = folder / "finished"
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(GRID))
    ended = run(server, folder, arguments, how)
    assert set(ended.codes) == {0}, ended.said
    return Finished(folder, contents(folder / "out"))


@pytest.mark.parametrize("name", MODES)
def test_killed_at_random_moments(name, server, tries, account, tmp_path):
    count = tries(0, 20)
    settings, kinds, how = MODES[name]
    arguments = SWEEP if name == "sweep" else RUN
    finished, generator, killed = finish(server, tmp_path, settings, arguments, how), random.Random(time.time_ns()), 0
    stages = [stage for stage in finished.stages() if stage.split("-")[0] in kinds]
    assert len(stages) == len(kinds), f"the run builds {stages}"
    for stage in stages:
        place = finished.without(stage, tmp_path / "killed")
        seconds, left = run(server, place, arguments, how).seconds, count
        finished.compare(place, f"{stage} without a kill")
        while left:
            place, moment = finished.without(stage, tmp_path / "killed"), generator.uniform(0.0, seconds)
            what = f"{name}: {stage} killed after {moment:.3f} s"
            if not any(run(server, place, arguments, how, moment).codes):
                seconds *= 0.9  # it had ended before
                continue
            finished.check_published(place, what)
            again = run(server, place, arguments, how)
            assert set(again.codes) == {0}, f"{what}: {again.said}"
            finished.compare(place, what)
            left, killed = left - 1, killed + 1
    account(f"kill -9, {name}", tried=killed, survived=killed)


def test_two_runs_on_one_folder(server, tries, account, tmp_path):
    count = tries(0, 5)
    finished = finish(server, tmp_path, shortest_run())
    for _ in range(count):
        folder = tmp_path / "both"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(finished.folder / "run.yaml", folder)
        ended = run(server, folder, RUN, {"times": 2})
        assert ended.codes == [0, 0], ended.said
        finished.compare(folder, "two runs at once")
    account("two runs on one folder", tried=count, survived=count)


def test_a_worker_that_the_system_kills(server, tries, account, tmp_path):
    """As it does when memory is short. The command says so in one line, and continues."""
    count = tries(0, 5)
    finished = finish(server, tmp_path, shortest_run(workers=2))
    stage, left = next(name for name in finished.stages() if name.startswith("pretrain")), count
    while left:
        place = finished.without(stage, tmp_path / "killed")
        (leader,) = server.start(place, RUN)
        while not (workers := [number for number in session(leader) if number != leader and _spawned(number)]):
            time.sleep(0.02)
        until = time.monotonic() + 60
        while not list(place.glob("out/stages/.pretrain*.partial")):
            assert time.monotonic() < until
            time.sleep(0.005)
        for worker in workers:
            kill(worker)
        ended = server.wait()
        if ended.codes != [0]:  # the stage was not finished
            assert ended.codes == [1] and ended.said.count("\n") == 1 and "the same command continues" in ended.said, ended.said
            left -= 1
        again = run(server, place, RUN, {})
        assert again.codes == [0], again.said
        finished.compare(place, "a worker was killed")
    account("worker killed for lack of memory", tried=count, survived=count)


def _spawned(process):
    try:
        return b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_too_little_memory(server, tries, account, tmp_path):
    """A model of 15 MB, which with gradients and moments takes 60; its large tensors are what finds no room."""
    count, run_of_it = tries(0, 24), shortest_run()
    run_of_it["model"]["config"] |= {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 2}
    finished = finish(server, tmp_path, run_of_it)
    stage = next(name for name in finished.stages() if name.startswith("pretrain"))
    for megabytes in range(2, 2 + 3 * count, 3):
        place = finished.without(stage, tmp_path / "small")
        ended = run(server, place, RUN, {"memory": megabytes << 20})
        if ended.codes != [0]:
            assert ended.said.count("\n") == 1 and "memory" in ended.said, f"{megabytes} MB: {ended}"
            assert ended.said.endswith(("the same command continues\n", IN_GLIBC)), f"{megabytes} MB: {ended}"
        again = run(server, place, RUN, {})
        assert again.codes == [0], again.said
        finished.compare(place, f"{megabytes} MB")
    account("too little memory", tried=count, survived=count)
