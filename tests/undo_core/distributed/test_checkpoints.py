"""Checkpoints of two ranks: written while training goes on, published when complete, and refused when a file is missing or torn."""

import json
import os
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from rank_cases import first_gradients, largest_error, pretraining, sequences, untied
from ranks import on_ranks

from undo_core import distributed
from undo_core.distributed import storage
from undo_core.distributed.sharding import whole_state
from undo_core.training import TrainConfig
from undo_core.training.batches import SequenceSource
from undo_core.training.training_state import find_training_state

CONFIG = TrainConfig(steps=4, batch_size=8, lr=1e-2, eps=1e-2, seed=1)


class Watched(SequenceSource):
    """A source that calls ``seen`` with each step."""

    def __call__(self, step):
        self.seen(step)
        return super().__call__(step)


def trained(folder, seen=lambda step: None, seconds=-1.0):
    """Trains with a checkpoint after every step, or after ``seconds``; returns the weights."""
    model, source = untied(), Watched(sequences(), CONFIG.batch_size, 0)
    object.__setattr__(source, "seen", seen)
    object.__setattr__(source, "identity", SequenceSource(sequences(), CONFIG.batch_size, 0).identity)
    pretraining(model, CONFIG, source=source, folder=folder, checkpoint_seconds=seconds)
    return model.state_dict() if distributed.count() == 1 else whole_state(model)


def stop_at(last):
    def seen(step):
        if step == last:
            raise KeyboardInterrupt

    return seen


def replace_write(change):
    """Has every checkpoint of this process written by ``change(folder, write)``, which calls ``write()`` or does not."""
    writer = storage._writer()
    original = writer.write_data
    writer.write_data = lambda self, plan, planner: change(self.path, lambda: original(self, plan, planner))


def goes_on(folder, last, seconds):
    """Trains while the first checkpoint waits for step ``last``; returns the weights and the checkpoints at each step."""
    reached, found = threading.Event(), []

    def slow(path, write):
        assert reached.wait(60), "the training waits for the checkpoint"
        return write()

    def seen(step):
        found.append(sorted(path.name for path in (folder / "checkpoint").glob("step-*")))
        if step == last:
            reached.set()

    replace_write(slow)
    return trained(folder, seen, seconds), found


def all_cases(folder):
    """Runs on each of two ranks what needs no process to die; the last three leave the process changed."""
    found = {"whole": trained(None)}
    with pytest.raises(KeyboardInterrupt):
        trained(folder / "cut", stop_at(2))
    found["goes on"] = goes_on(folder / "on", 1, -1.0)
    found["puts off"] = goes_on(folder / "off", CONFIG.steps - 1, 0.0)
    found["adopted"] = adopted(folder)
    return found


def adopted(folder):
    """Gradients in a process group of the caller, and whether it is still there afterwards."""
    distributed.stop()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
    distributed.start()
    found = first_gradients(untied(), pretraining)
    distributed.stop()
    return found, dist.is_initialized()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder):
    return on_ranks(2, all_cases, folder)


@pytest.fixture
def cut(two, folder, tmp_path):
    """A copy of the folder of a run that ended in step 2, and its checkpoint."""
    shutil.copytree(folder / "cut", tmp_path / "cut")
    return tmp_path / "cut", tmp_path / "cut" / "checkpoint" / "step-2"


def test_training_goes_on_while_a_checkpoint_is_written(two, folder):
    (weights, seen), (whole, *_) = two[0]["goes on"], [two[0]["whole"]]
    assert seen[1] == [], "published before it was written"
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.items())
    assert [path.name for path in (folder / "on" / "checkpoint").iterdir()] == ["step-4"]  # the end waited for the last


def test_a_checkpoint_that_is_due_while_another_is_written_is_put_off(two):
    assert (
        two[0]["puts off"][1] == [[]] * CONFIG.steps
    )  # else the second would have waited for the first, which waits for the end


def test_what_is_written_is_listed(cut):
    _, checkpoint = cut
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["ranks"] == 2 and len(state["files"]) == 2
    assert state["files"] == {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}


def test_a_missing_shard_is_refused(cut):
    folder, checkpoint = cut
    shard = min(checkpoint.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(
        ValueError, match=rf"^checkpoint: .*step-2 lacks {shard.name}, written by one of 2 ranks; delete"
    ) as error:
        trained(folder)
    assert "\n" not in str(error.value)


def test_a_torn_shard_is_refused(cut):
    folder, checkpoint = cut
    shard = max(checkpoint.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(ValueError, match=rf"step-2 has \d+ of the {shard.stat().st_size + 1} bytes of {shard.name}; delete"):
        trained(folder)


def test_a_shard_without_its_header_is_refused_by_name(cut):
    folder, checkpoint = cut
    shard = max(checkpoint.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.write(bytes(16))
    with pytest.raises(ValueError, match=f"^checkpoint: .*step-2 has a torn {shard.name} .*; delete"):
        trained(folder)


@pytest.mark.parametrize(
    ("text", "fault"),
    [('{"step": 3}', "the state.json of step 3"), ("{}", "a torn state.json"), ("", "a torn state.json")],
)
def test_a_torn_or_foreign_state_is_refused(cut, text, fault):
    folder, checkpoint = cut
    (checkpoint / "state.json").write_text(text)
    with pytest.raises(ValueError, match=f"^checkpoint: .*step-2 has {fault}.*; delete"):
        trained(folder)


def test_the_previous_complete_checkpoint_is_used(cut, capsys):
    _, checkpoint = cut
    newer = checkpoint.with_name("step-3")
    shutil.copytree(checkpoint, newer)
    state = json.loads((checkpoint / "state.json").read_text())
    (newer / "state.json").write_text(json.dumps({**state, "step": 3}))
    min(newer.glob("*.safetensors")).unlink()
    made_by = state["made_by"]
    assert find_training_state(checkpoint.parent, made_by)[0] == checkpoint
    (line,) = capsys.readouterr().out.splitlines()
    assert "step-3 lacks" in line and line.endswith("continuing from step-2")


def test_a_hole_in_a_tensor_is_refused(cut):
    """The files are as long as they were, but a shard is a copy of the other one."""
    _, checkpoint = cut
    first, second = sorted(checkpoint.glob("*.safetensors"))
    shutil.copyfile(second, first)
    with pytest.raises(ValueError, match=r"^checkpoint: got \d+ elements of .* wanted \d+"):
        storage.stored_shapes(checkpoint)


def killed_in_the_second_write(folder):
    count = 0

    def die(path, write):
        nonlocal count
        count += 1
        if count == 2 and distributed.rank() == 1:
            (path / "torn").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        if count == 2:
            time.sleep(60)  # until this rank is killed too: one that saw its peer die first would remove what is torn
        return write()

    replace_write(die)
    trained(folder)


def test_a_rank_that_is_killed_while_writing_leaves_the_previous_checkpoint(two, tmp_path):
    with pytest.raises(AssertionError, match="failed"):
        on_ranks(2, killed_in_the_second_write, tmp_path)
    left = {path.name.rpartition("-")[0] for path in (tmp_path / "checkpoint").iterdir()}
    assert left == {"step", "writing-2"} and (tmp_path / "checkpoint" / "step-1").exists()
    weights = on_ranks(2, trained, tmp_path)[0]
    assert all(torch.equal(weights[name], tensor) for name, tensor in two[0]["whole"].items())
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-4"]


def full_on_rank_1(folder):
    def fail(path, write):
        if distributed.rank() == 1:
            raise OSError("no space left")
        return write()

    replace_write(fail)
    with pytest.raises(RuntimeError) as error:
        trained(folder)
    return str(error.value)


def test_a_failed_write_is_reported_alike_by_all_ranks(tmp_path):
    said = on_ranks(2, full_on_rank_1, tmp_path)
    assert said == ["checkpoint: rank 1 could not write it: OSError: no space left"] * 2
    assert not list((tmp_path / "checkpoint").iterdir()), "what could not be written takes no room on the disk"


def test_a_process_group_of_the_caller_is_used_and_stays(two):
    found, stays = two[0]["adopted"]
    assert stays and largest_error(found, first_gradients(untied(), pretraining)) < 2e-6
