"""The search for settings that fit, with known predictions; pipeline/test_memory.py tests the predictions."""

import itertools

import pytest
import torch
from stage_kinds import NOWHERE
from tiny_run import RUN

from undo_core import UnlearnConfig
from undo_core.attacks.config import AttackConfig
from undo_core.attacks.search import SearchConfig
from undo_core.pipeline.config import ControlsConfig, DataConfig, ModelConfig, RunConfig
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stages import Distill, Pretrain, Relearn, Search, Unlearn
from undo_core.planning import fit
from undo_core.planning.fit import cheapest_fit, fit_notes
from undo_core.training import TrainConfig

SAVED = {  # of 1000
    ("activation_checkpointing", True): 100,
    ("step_in_backward", True): 150,
    ("optimizer", "adamw-8bit"): 50,
    ("optimizer", "adamw-4bit"): 60,
    ("precision", "bfloat16-stochastic"): 300,
    ("teacher.kind", "cached"): 80,
}


def distilled(**train) -> Distill:
    inputs = dict.fromkeys(("prepared", "teacher", "student"), NOWHERE)
    return Distill(train=TrainConfig(**{"batch_size": 64, **train}), recover=None, **inputs)


def pretrained(**train) -> Pretrain:
    return Pretrain(train=TrainConfig(**{"batch_size": 64, **train}), splits=("retain",), prepared=NOWHERE)


def need(changes):
    """Returns bytes: a base less what the changes save, and two for each sequence of a micro-batch."""
    sequences = next((value for path, value in changes.items() if path.endswith("micro_batch_size")), 64)
    return 1000 + 2 * sequences - sum(SAVED.get((path.removeprefix("train."), value), 0) for path, value in changes.items())


def every_set(stage):
    """Yields, by brute force, all compatible sets of changes in the order of binary numbers, with each halved micro-batch."""
    possible = stage.cheaper()
    for number in range(1 << len(possible)):
        chosen = [change for index, change in enumerate(possible) if number >> index & 1]
        flags = [change.flag for change in chosen]
        if len(set(flags)) < len(flags) or {"train.micro_batch_size", "train.step_in_backward"} <= set(flags):
            continue
        for values in itertools.product(*(change.values for change in chosen)):
            yield dict(zip(flags, values, strict=True))


@pytest.mark.parametrize("limit", range(480, 1130, 40))
def test_the_search_finds_the_cheapest_of_all_sets(limit):
    asked = []

    def count(changes):
        asked.append(changes)
        return need(changes)

    found, least = cheapest_fit(distilled(), limit, count)
    fitting = [changes for changes in every_set(distilled()) if need(changes) <= limit]
    smallest = min(need(changes) for changes in every_set(distilled()))
    if fitting:
        assert found.changes == fitting[0] and found.memory_bytes == need(fitting[0])
    else:
        assert found is None and least.memory_bytes == smallest
    assert len(asked) <= 3 * len(distilled().cheaper()) < sum(1 for _ in every_set(distilled()))


def test_what_is_so_already_is_not_suggested():
    stage = pretrained(activation_checkpointing=True, micro_batch_size=1, precision="bfloat16")
    found, least = cheapest_fit(stage, 1, need)
    assert found is None
    assert not {"activation_checkpointing", "micro_batch_size", "precision"} & {path.split(".")[1] for path in least.changes}
    assert "teacher.kind" not in least.changes, "only a distillation has a teacher"


def test_changes_leave_the_stage_as_it_is():
    stage = distilled()
    changed = stage.changed({"train.micro_batch_size": 4, "teacher.kind": "cached"})
    assert changed.train.micro_batch_size == 4 and changed.config.kind == "cached"
    assert changed.cache.config == changed.config and changed.cache.config.batch_size == 4
    assert stage == distilled() and stage.cache is None


def test_what_a_changed_stage_reads_besides_has_to_fit_too():
    stage, sizes = distilled(), {"distill": 10, "cache": 30}
    predict = lambda one: Memory("forward", weights=sizes[one.kind])  # noqa: E731
    assert fit.peak(predict, stage, {}) == 10 and fit.peak(predict, stage, {"teacher.kind": "cached"}) == 30


def test_changes_of_one_name_or_that_exclude_each_other_are_never_made_together():
    for one, other in itertools.combinations(distilled().cheaper(), 2):
        flags = {one.flag, other.flag}
        agree = fit._agree([distilled()], one, other)
        assert agree == (len(flags) == 2 and flags != {"train.micro_batch_size", "train.step_in_backward"})


def asked(stage):
    """Returns each set of changes that is tried, for a limit that none meets and for limits that some meet."""
    tried = []
    for limit in (0, 500, 700, 900, 1000):
        cheapest_fit(stage, limit, lambda changes: tried.append(changes) or need(changes))
    assert tried
    return tried


@pytest.mark.parametrize("robust", ["none", "sam", "repnoise"])
def test_what_the_settings_refuse_is_not_suggested(robust, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # offloading too
    config = UnlearnConfig("maxent", robust=robust, train=TrainConfig(batch_size=64))
    stage = Unlearn(config=config, prepared=NOWHERE, model=NOWHERE)
    found = set()
    for changes in asked(stage):
        stage.changed(changes)  # refuses incompatible changes
        found |= {(path.removeprefix("train."), value) for path, value in changes.items()}
    names = {name for name, _ in found}
    assert {"activation_checkpointing", "optimizer"} <= names
    assert ("micro_batch_size" in names) == (robust != "repnoise"), "it would be another loss"
    assert (("optimizer", "adamw-offload") in found) == ("precision" in names) == (robust != "sam")


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
def test_another_optimizers_weights_are_not_rounded_stochastically(optimizer):
    stage = pretrained(optimizer=optimizer)
    for changes in asked(stage):
        stage.changed(changes)
        assert "train.precision" not in changes


def memory_of(stage):
    """Bytes of an attack that trains: a base and two for each sequence of a micro-batch, less what checkpointing saves."""
    if not isinstance(stage, (Relearn, Search)):
        return Memory("loading", weights=1)
    train = stage.training
    sequences = train.micro_batch_size or train.batch_size
    return Memory("forward", weights=1000 + 2 * sequences - 100 * train.activation_checkpointing)


@pytest.mark.parametrize("like", [None, AttackConfig(batch_size=64)])
def test_a_search_fits_with_settings_of_the_attack_that_it_is_like(tmp_path, monkeypatch, like):
    """Neither with what is searched, nor with a precision that a searched optimizer refuses."""
    monkeypatch.setattr(fit, "predictor", lambda config: memory_of)
    config = RunConfig(
        name="x",
        output=str(tmp_path),
        data=DataConfig(kind="arithmetic-compact"),
        model=ModelConfig(config=RUN["model"]["config"]),
        controls=ControlsConfig(filter=False, random=False),
        relearn=AttackConfig(batch_size=4),
        attacks={"searched": SearchConfig(batch_sizes=[64], like=like)},
    )
    section = "relearn" if like is None else "attacks.searched.like"
    assert fit_notes(config, 1128) == ([], [])
    (line,), hopeless = fit_notes(config, 1127)
    assert line.startswith("searched: ") and line.endswith(f"with --{section}.activation_checkpointing=true") and not hopeless
    flags, hopeless = fit_notes(config, 900)
    line = next(line for line in hopeless if "searched" in line)
    assert line.startswith("searched needs at least" if like else "relearn and searched needs at least") and flags == []
    given = dict(flag.split("=") for flag in line.split() if flag.startswith("--"))
    assert given[f"--{section}.micro_batch_size"] == "1" and given[f"--{section}.activation_checkpointing"] == "true"
    assert f"--{section}.precision" not in given and (like is None or f"--{section}.optimizer" not in given)
