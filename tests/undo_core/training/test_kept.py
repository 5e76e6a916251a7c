"""Training ahead of a stop rule that cannot be asked yet ends where the rule would have ended it."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from undo_core.training import DivergedError, TrainConfig, kept, sequence_source, train
from undo_core.training.batches import SequenceSource
from undo_core.training.losses import cross_entropy
from undo_core.training.training_state import CheckpointWriter

EVERY, STEPS = 3, 12


def loss(model, batches, counted):
    return cross_entropy(model, batches["text"], counted["text"])


def norm(model):
    return {"norm": float(torch.cat([p.detach().double().flatten() for p in model.parameters()]).norm())}


class Dying(SequenceSource):
    """Is killed before step ``last``."""

    last = STEPS

    def __call__(self, step):
        if step == self.last:
            raise KeyboardInterrupt
        return super().__call__(step)


def trained(model, sequences, folder, *, stop, known=None, loss=loss, killed=None, **settings):
    """Trains ``model``; ``known`` is called with the number of its earlier calls."""
    source = sequence_source(sequences, 16, 0)
    if killed is not None:
        source = Dying(sequences, 16, 0)
        source.last = killed
    asked = iter(range(1000))
    config = TrainConfig(steps=STEPS, batch_size=16, lr=3e-3, warmup=2, eval_every=EVERY, **settings)
    folder.mkdir(exist_ok=True)
    return train(
        model,
        loss,
        {"text": source},
        config,
        evaluate=norm,
        stop=lambda metrics: stop(metrics["norm"]),
        stop_known=None if known is None else lambda: known(next(asked)),
        folder=folder,
        checkpoint_seconds=10.0 if killed is None else -1.0,
        progress=False,
    )


def facts(result):
    return {name: value for name, value in vars(result).items() if name != "seconds"}


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture
def norms(tiny, sequences, tmp_path):
    """The norm at each evaluation."""
    result = trained(tiny(), sequences, tmp_path / "whole", stop=lambda value: False)
    return [entry["norm"] for entry in result.history]


@pytest.mark.parametrize("at", [0, 3, 4, None], ids=lambda at: f"stop at {at}")
@pytest.mark.parametrize("known", [2, 99], ids=lambda known: f"known at {known}")
def test_it_ends_where_the_rule_ends_it(tiny, sequences, tmp_path, norms, at, known):
    stop = lambda value: at is not None and value == norms[at]  # noqa: E731
    model, ahead = tiny(), tiny()
    wanted = trained(model, sequences, tmp_path / "a", stop=stop)
    result = trained(ahead, sequences, tmp_path / "b", stop=stop, known=lambda asked: asked >= known)
    assert wanted.steps == (STEPS if at is None else EVERY * at)
    assert facts(result) == facts(wanted) and same(ahead, model)
    assert (tmp_path / "b/log.jsonl").read_text() == (tmp_path / "a/log.jsonl").read_text()


@pytest.mark.parametrize("precision", ["bfloat16-master", "bfloat16-stochastic"])
def test_it_goes_back_in_every_precision(tiny, sequences, tmp_path, precision):
    models, results = [tiny(), tiny()], []
    for model, known in zip(models, [None, lambda asked: False], strict=True):
        count = iter(range(1000))
        stop = lambda value, count=count: next(count) == 2  # noqa: E731
        results.append(trained(model, sequences, tmp_path / str(known is None), stop=stop, known=known, precision=precision))
    assert results[0].steps == 2 * EVERY and facts(results[1]) == facts(results[0]) and same(*models)


def test_without_room_it_asks_and_waits(tiny, sequences, tmp_path, norms, monkeypatch):
    model, asked = tiny(), []
    two = 2.5 * sum(p.nbytes for p in model.parameters())
    monkeypatch.setattr(kept, "ROOM", two)
    result = trained(
        model, sequences, tmp_path, stop=lambda value: bool(asked.append(value)) or value == norms[3], known=lambda n: False
    )
    assert result.steps == 3 * EVERY and asked == norms[:4], "the third evaluation no longer fits, so the first two are asked"


def test_a_loss_that_is_not_finite_after_the_end_does_not_matter(tiny, sequences, tmp_path, norms):
    def failing(model, batches, counted):
        calls.append(1)
        return loss(model, batches, counted) * (float("nan") if len(calls) > 8 else 1.0)

    calls, model = [], tiny()
    given = {"known": lambda n: False, "loss": failing}
    result = trained(model, sequences, tmp_path / "a", stop=lambda value: value == norms[2], **given)
    assert result.steps == 2 * EVERY and norm(model)["norm"] == norms[2] and len(calls) == 9
    calls = []
    with pytest.raises(DivergedError, match="the loss is nan by step 9"):
        trained(tiny(), sequences, tmp_path / "b", stop=lambda value: False, **given)


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("known", [True, False])
def test_killed_ahead_of_its_rule_it_ends_with_the_same_bits(tiny, sequences, tmp_path, norms, step, known):
    given = {"stop": lambda value: value == norms[1], "folder": tmp_path / "ahead"}
    with pytest.raises(KeyboardInterrupt):
        trained(tiny(), sequences, known=lambda n: False, killed=step, **given)
    model = tiny()
    result = trained(model, sequences, known=lambda n: known, **given)
    assert result.steps == EVERY and norm(model)["norm"] == norms[1]
    assert [entry["norm"] for entry in result.history] == norms[:2]


def test_killed_after_it_went_back_it_ends_with_the_same_bits(tiny, sequences, tmp_path, norms, monkeypatch):
    write = CheckpointWriter.write
    given = {"stop": lambda value: value == norms[1], "folder": tmp_path / "ahead"}
    with monkeypatch.context() as patch:  # the newest checkpoint is one from before it went back
        unless_done = lambda self, step, state: state["result"]["stopped"] or write(self, step, state)  # noqa: E731
        patch.setattr(CheckpointWriter, "write", unless_done)
        trained(tiny(), sequences, known=lambda n: n > 2, killed=STEPS, **given)
    (newest,) = (tmp_path / "ahead/checkpoint").glob("step-*")
    assert newest.name == f"step-{3 * EVERY - 1}"
    model = tiny()
    result = trained(model, sequences, known=lambda n: True, **given)
    assert result.steps == EVERY and norm(model)["norm"] == norms[1]


def test_what_a_run_keeps_is_not_taken_for_that_of_the_next(tiny, sequences, tmp_path, norms):
    """Without a checkpoint the stage begins again, and its weights may differ, as after a change of the code."""
    folder = tmp_path / "ahead"
    with pytest.raises(KeyboardInterrupt):
        trained(tiny(), sequences, folder, stop=lambda value: False, known=lambda n: False, killed=8)
    shutil.rmtree(folder / "checkpoint")
    result = trained(tiny(), sequences, folder, stop=lambda value: value == norms[2], known=lambda n: n > 0)
    assert result.steps == 2 * EVERY


def test_the_rule_gets_metrics_of_every_name(tiny, sequences, tmp_path, norms):
    """``step`` and ``loss`` are names in the history too."""
    result = train(
        tiny(),
        loss,
        {"text": sequence_source(sequences, 16, 0)},
        TrainConfig(steps=STEPS, batch_size=16, lr=3e-3, warmup=2, eval_every=EVERY),
        evaluate=lambda model: {"loss": norm(model)["norm"], "step": -1.0},
        stop=lambda metrics: metrics["step"] == -1.0 and metrics["loss"] == norms[2],
        stop_known=lambda: False,
        folder=tmp_path / "named",
        progress=False,
    )
    assert result.steps == 2 * EVERY


def test_the_time_for_which_the_rule_waits_is_not_spent_on_training(tiny, sequences, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("undo_core.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))
    waiting = lambda value: bool(clock.__setitem__(0, clock[0] + 1000))  # noqa: E731
    result = trained(tiny(), sequences, tmp_path, stop=waiting, known=lambda asked: asked > 0)
    assert clock[0] >= 5000 and result.seconds == 0 and result.steps == STEPS


def test_the_steps_that_it_took_too_many_are_not_in_its_seconds(tiny, sequences, tmp_path, norms, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("undo_core.training.loop.time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ticking(*arguments):
        clock[0] += 1
        return loss(*arguments)

    given = {"stop": lambda value: value == norms[1], "known": lambda asked: asked > 2, "loss": ticking}
    result = trained(tiny(), sequences, tmp_path / "ahead", killed=STEPS, **given)  # with a checkpoint after each step
    assert clock[0] > 2 * EVERY and result.steps == result.seconds == EVERY
