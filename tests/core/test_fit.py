"""The search for settings that fit, on predictions that are known; what is predicted is of test_memory.py."""

import dataclasses
import itertools

import pytest
import torch

from undo_core import UnlearnConfig
from undo_core.planning import fit
from undo_core.planning.fit import CHANGES, apply_changes, cheapest_fit
from undo_core.training import TrainConfig
from undo_core.unlearning import unlearn_config

SAVED = {  # of 1000
    ("activation_checkpointing", True): 100,
    ("step_in_backward", True): 150,
    ("optimizer", "adamw-8bit"): 50,
    ("optimizer", "adamw-4bit"): 60,
    ("precision", "bfloat16-stochastic"): 300,
    ("teacher.kind", "cached"): 80,
}


def settings(**train):
    return {"train": dataclasses.asdict(TrainConfig(**{"batch_size": 64, **train})), "teacher": {"kind": "resident"}}


def need(changes):
    """Bytes: what the changes save, and two for each row of a micro-batch."""
    rows = next((value for path, value in changes.items() if path.endswith("micro_batch_size")), 64)
    return 1000 + 2 * rows - sum(SAVED.get((path.removeprefix("train."), value), 0) for path, value in changes.items())


def every_set(kind, stage):
    """Sets of changes that agree, in the order of binary numbers, each micro-batch of halves; by brute force."""
    possible = [change for change in CHANGES if fit._possible(kind, stage, *change)]
    for number in range(1 << len(possible)):
        chosen = [change for index, change in enumerate(possible) if number >> index & 1]
        names = [name for name, _ in chosen]
        if len(set(names)) < len(names) or {"micro_batch_size", "step_in_backward"} <= set(names):
            continue
        sizes = (32, 16, 8, 4, 2, 1) if "micro_batch_size" in names else (None,)
        for size in sizes:
            yield {fit._path(kind, name): size if name == "micro_batch_size" else value for name, value in chosen}


@pytest.mark.parametrize("limit", range(480, 1130, 40))
def test_the_search_finds_the_cheapest_of_all_sets(limit):
    asked = []

    def count(changes):
        asked.append(changes)
        return need(changes)

    found, least = cheapest_fit("distill", settings(), limit, count)
    fitting = [changes for changes in every_set("distill", settings()) if need(changes) <= limit]
    smallest = min(need(changes) for changes in every_set("distill", settings()))
    if fitting:
        assert found.changes == fitting[0] and found.memory_bytes == need(fitting[0])
    else:
        assert found is None and least.memory_bytes == smallest
    assert len(asked) <= 3 * len(CHANGES) < sum(1 for _ in every_set("distill", settings()))


def test_what_is_so_already_is_not_suggested():
    stage = settings(activation_checkpointing=True, micro_batch_size=1, precision="bfloat16")
    found, least = cheapest_fit("pretrain", stage, 1, need)
    assert found is None
    assert not {"activation_checkpointing", "micro_batch_size", "precision"} & {path.split(".")[1] for path in least.changes}
    assert "teacher.kind" not in least.changes, "only a distillation has a teacher"


def test_changes_leave_the_settings_as_they_are():
    stage = settings()
    changed = apply_changes(stage, {"train.micro_batch_size": 4, "teacher.kind": "cached"})
    assert changed["train"]["micro_batch_size"] == 4 and changed["teacher"] == {"kind": "cached"}
    assert stage == settings()


def test_changes_of_one_name_or_that_exclude_each_other_are_never_made_together():
    for one, other in itertools.combinations(CHANGES, 2):
        names = {one[0], other[0]}
        agree = fit._agree("distill", settings(), one, other)
        assert agree == (len(names) == 2 and names != {"micro_batch_size", "step_in_backward"})


def asked(kind, stage):
    """Every set of changes that is tried, at a limit that none meets and at those that some meet."""
    tried = []
    for limit in (0, 500, 700, 900, 1000):
        cheapest_fit(kind, stage, limit, lambda changes: tried.append(changes) or need(changes))
    assert tried
    return tried


@pytest.mark.parametrize("robust", ["none", "sam", "repnoise"])
def test_what_the_settings_refuse_is_not_suggested(robust, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # offloading too
    stage = UnlearnConfig("maxent", robust=robust, train=TrainConfig(batch_size=64)).settings()
    found = set()
    for changes in asked("unlearn", stage):
        unlearn_config(apply_changes(stage, changes))  # refuses what cannot go together
        found |= {(path.removeprefix("train."), value) for path, value in changes.items()}
    names = {name for name, _ in found}
    assert {"activation_checkpointing", "optimizer"} <= names
    assert ("micro_batch_size" in names) == (robust != "repnoise"), "it would be another loss"
    assert (("optimizer", "adamw-offload") in found) == ("precision" in names) == (robust != "sam")


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_another_optimizers_weights_are_not_rounded_stochastically(optimizer):
    stage = settings(optimizer=optimizer)
    for changes in asked("pretrain", stage):
        TrainConfig(**apply_changes(stage, changes)["train"])
        assert "train.precision" not in changes
