import json
import math
from types import SimpleNamespace

import pytest
import torch
from rounding import assert_same_function

from undo_core.data.sequences import Sequences
from undo_core.models import build_model
from undo_core.training import DivergedError, TrainConfig, as_source, loop, sequence_source, train
from undo_core.training.batches import SequenceSource
from undo_core.training.losses import cross_entropy


def loss(model, batches, counted):
    return cross_entropy(model, batches["text"], counted["text"])


def config(**changes):
    return TrainConfig(**{"steps": 12, "batch_size": 16, "lr": 3e-3, "schedule": "cosine", "warmup": 2, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_loss_falls(tiny, sequences):
    model = tiny()
    result = train(model, loss, {"text": sequence_source(sequences, 16, 0)}, config(steps=80, eval_every=20), progress=False)
    losses = [entry["loss"] for entry in result.history[1:]]
    assert losses[-1] < 0.8 * losses[0]
    assert (
        result.steps == 80 and result.positions == {"text": 80 * 16 * 8} and result.stopped is None and not result.limit_reached
    )


@pytest.mark.parametrize("micro", [1, 5, 16])
def test_micro_batches_do_not_change_the_gradient(tiny, sequences, micro):
    whole, split = tiny(), tiny()
    train(whole, loss, {"text": sequence_source(sequences, 16, 0)}, config(steps=1, lr=0.0, clip=0.0, warmup=0), progress=False)
    from undo_core.training.loop import accumulate

    batch = sequence_source(sequences, 16, 0)(0)
    for model, size in ((whole, None), (split, micro)):
        accumulate(model.double(), loss, {"text": batch}, {"text": batch.counted}, size)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert_same_function(b.grad, a.grad, a.grad)  # in float64, except for the model's norms, which compute in float32


def test_killed_at_any_step_it_ends_with_the_same_bits(tiny, sequences, tmp_path):
    def run(folder, source):
        model = tiny()
        evaluate = lambda m: {"norm": float(weights(m).norm())}  # noqa: E731
        settings = config(eval_every=3)
        return model, train(
            model, loss, {"text": source}, settings, evaluate=evaluate, folder=folder, checkpoint_seconds=0.0, progress=False
        )

    plain = sequence_source(sequences, 16, 0)
    (tmp_path / "whole").mkdir()
    model, whole = run(tmp_path / "whole", plain)
    for kill in (1, 5, 6, 11):
        folder = tmp_path / f"killed-{kill}"
        folder.mkdir()

        class Dying(SequenceSource):
            def __call__(self, step, kill=kill):
                if step == kill:
                    raise KeyboardInterrupt
                return super().__call__(step)

        with pytest.raises(KeyboardInterrupt):
            run(folder, Dying(sequences, 16, 0))
        resumed, result = run(folder, plain)
        assert torch.equal(weights(resumed), weights(model))
        assert result.history == whole.history and result.tokens == whole.tokens
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 3, 6, 9, 12]


def test_a_torn_checkpoint_is_never_loaded(tiny, sequences, tmp_path):
    train(
        tiny(),
        loss,
        {"text": sequence_source(sequences, 16, 0)},
        config(),
        folder=tmp_path,
        checkpoint_seconds=0.0,
        progress=False,
    )
    torn = tmp_path / "checkpoint" / "writing"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"torn")
    model = tiny()
    result = train(model, loss, {"text": sequence_source(sequences, 16, 0)}, config(), folder=tmp_path, progress=False)
    assert result.steps == 12


@pytest.mark.parametrize(
    ("changes", "seed", "message"),
    [
        ({"lr": 1e-3}, 0, "made with lr 0.003; wanted lr 0.001, or a new folder"),
        (
            {"steps": 24, "optimizer": "adamw-8bit"},
            0,
            "made with steps 12, optimizer adamw; wanted steps 24, optimizer adamw-8bit",
        ),
        ({"seed": 1}, 0, "made with seed None; wanted seed 1"),
        ({}, 1, "made with sources.text.seed 0; wanted sources.text.seed 1"),
    ],
)
def test_a_checkpoint_made_otherwise_is_refused(tiny, sequences, tmp_path, changes, seed, message):
    def run(model, seed=0, **options):
        source = {"text": sequence_source(sequences, 16, seed)}
        return train(model, loss, source, config(**options.pop("config", {})), folder=tmp_path, progress=False, **options)

    run(tiny(), checkpoint_seconds=0.0)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    model = tiny()
    with pytest.raises(ValueError, match=f"^folder: got .* with a checkpoint {message}"):
        run(model, seed, config=changes)
    assert torch.equal(weights(model), weights(tiny()))
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"made with penalty None; wanted penalty 2"):
        run(model, settings={"penalty": 2})
    assert run(model).steps == 12


@pytest.mark.parametrize(("writing", "steps"), [(0.25, [11, 22, 33, 44, 55]), (2.0, [11, 52])])
def test_checkpoints_take_a_small_share_of_the_time(tiny, sequences, tmp_path, monkeypatch, writing, steps):
    """A step takes a second on this clock: checkpoints come every 10 seconds, or once they took 5 % of the time since the last."""
    now, written = 0.0, []

    def slow_step(*arguments):
        nonlocal now
        now += 1.0
        return loss(*arguments)

    def write(self, step, state):
        nonlocal now
        now += writing
        written.append(step)

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(loop.CheckpointWriter, "write", write)
    source = {"text": sequence_source(sequences, 16, 0)}
    train(tiny(), slow_step, source, config(steps=60), folder=tmp_path, progress=False)
    assert written == steps


def test_other_sequences_are_refused(tiny, sequences, tmp_path):
    run = lambda sequences: train(  # noqa: E731
        tiny(),
        loss,
        {"text": sequence_source(sequences, 16, 0)},
        config(),
        folder=tmp_path,
        checkpoint_seconds=0.0,
        progress=False,
    )
    run(sequences)
    with pytest.raises(ValueError, match=r"made with sources.text.rows [0-9a-f]+; wanted sources.text.rows"):
        run(Sequences(sequences.input_ids.flip(0), sequences.pad_id))


def test_the_stop_rule_ends_it_and_a_limit_is_reported(tiny, sequences):
    seen = iter([0.1, 0.5, 0.95, 1.0])
    source = {"text": sequence_source(sequences, 16, 0)}
    run = lambda values, wanted: train(  # noqa: E731
        tiny(),
        loss,
        source,
        config(eval_every=4),
        evaluate=lambda m: {"x": next(values)},
        stop=lambda v: v["x"] >= wanted,
        progress=False,
    )
    result = run(seen, 0.9)
    assert result.steps == 8 and result.stopped and not result.limit_reached
    result = run(iter([0.1] * 9), 0.9)
    assert result.steps == 12 and result.stopped is False and result.limit_reached


def test_evaluations_happen_where_asked(tiny, sequences):
    steps = []
    source = {"text": sequence_source(sequences, 16, 0)}
    result = train(tiny(), loss, source, config(), evaluate=lambda m: {"x": 0.0}, evaluate_at=[0, 1, 7, 12], progress=False)
    steps = [entry["step"] for entry in result.history]
    assert steps == [0, 1, 7, 12]


def test_an_evaluation_that_is_known_at_the_start_is_not_made_again(tiny, sequences):
    asked = []

    def evaluate(model):
        asked.append(float(next(model.parameters()).sum()))
        return {"x": asked[-1]}

    source, options = {"text": sequence_source(sequences, 16, 0)}, {"evaluate": evaluate, "progress": False}
    first = train(tiny(), loss, source, config(), **options)
    made = len(asked)
    again = train(tiny(), loss, source, config(), known_at_start={"x": asked[0]}, **options)
    assert again.history == first.history and len(asked) == 2 * made - 1


def test_a_diverged_run_says_so(tiny, sequences):
    with pytest.raises(DivergedError, match="lower lr"):
        train(tiny(), lambda *a: loss(*a) * math.nan, {"text": sequence_source(sequences, 16, 0)}, config(), progress=False)


def test_an_attack_that_diverges_ends_with_numbers_that_a_file_can_hold(tiny, sequences, tmp_path):
    """JSON has neither NaN nor infinity. The run is also interrupted, and goes on from what it has written."""

    def diverging(*arguments):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return loss(*arguments) * math.nan

    steps, source, end = [], {"text": sequence_source(sequences, 16, 0)}, config(steps=6, eval_every=2)
    options = {"must_stay_finite": False, "progress": False, "folder": tmp_path, "checkpoint_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train(tiny(), diverging, source, end, **options)
    assert list(tmp_path.glob("checkpoint/step-*"))
    result = train(tiny(), diverging, source, end, **options)
    json.dumps(result.history, allow_nan=False)
    assert [entry["loss"] for entry in result.history[1:]] == [3.4e38] * 3 and len(steps) < 2 + 5 + 6


def test_a_loss_that_was_not_read_is_in_the_sum(tiny, sequences, monkeypatch):
    """On a GPU a step does not wait for its loss; still, a NaN in any loss is found before the stage is published."""
    monkeypatch.setattr(loop, "_is_read", lambda device, step: step % 10 == 0)
    seen = []

    def once(*arguments):
        seen.append(1)
        return loss(*arguments) * (math.nan if len(seen) == 4 else 1.0)

    source = {"text": sequence_source(sequences, 16, 0)}
    with pytest.raises(DivergedError, match="by step 8"):
        train(tiny(), once, source, config(steps=8), progress=False)
    assert len(seen) == 8


@pytest.mark.parametrize("finite", [True, False])
def test_an_infinite_gradient_in_the_last_step_is_not_published(tiny, sequences, finite):
    """The loss of that step is finite, and no later loss would show the effect of its update."""

    def gradient(model, *arguments):
        value = loop.accumulate(model, *arguments)
        steps.append(1)
        if len(steps) == 3:
            next(model.parameters()).grad.view(-1)[0] = math.inf
        return value

    steps, source, model = [], {"text": sequence_source(sequences, 16, 0)}, tiny()
    options = {"gradient": gradient, "must_stay_finite": finite, "progress": False}
    if finite:
        with pytest.raises(DivergedError, match="not finite after step 3"):
            train(model, loss, source, config(steps=3), **options)
    else:
        assert train(model, loss, source, config(steps=3), **options).steps == 3
    assert not next(model.parameters()).isfinite().all()


def test_what_dropout_draws_is_a_function_of_seed_and_step(tokenizer, sequences, tmp_path):
    shape = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    shape |= {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.1}

    def run(source, folder=None, **changes):
        torch.rand(3)  # earlier draws must not matter
        model, settings = build_model(shape, tokenizer, 0), config(steps=6, eval_every=2, **changes)
        train(model, loss, {"text": source}, settings, folder=folder, checkpoint_seconds=0.0, progress=False)
        return weights(model)

    class Dying(SequenceSource):
        def __call__(self, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().__call__(step)

    plain = sequence_source(sequences, 16, 0)
    whole, state = run(plain), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run(Dying(sequences, 16, 0), tmp_path)
    assert torch.equal(run(plain, tmp_path), whole)
    assert not torch.equal(run(plain, seed=1), whole), "other masks from another seed"
    torch.set_rng_state(state)
    drawn = torch.rand(6)
    torch.set_rng_state(state)
    run(plain)
    assert torch.equal(torch.rand(3), drawn[3:]), "the caller's generator goes on"


def test_rates():
    cosine = TrainConfig(steps=110, lr=1.0, min_lr=0.1, schedule="cosine", warmup=10)
    assert cosine.rate(0) == pytest.approx(0.1) and cosine.rate(9) == 1.0 and cosine.rate(10) == 1.0
    assert (
        cosine.rate(60) == pytest.approx(0.55)
        and cosine.rate(110) == pytest.approx(0.1)
        and cosine.rate(999) == pytest.approx(0.1)
    )
    linear = TrainConfig(steps=100, lr=1.0, schedule="linear")
    assert linear.rate(50) == pytest.approx(0.5) and linear.rate(100) == 0.0
    assert TrainConfig(lr=0.3).rate(10**6) == 0.3


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": -1},
        {"batch_size": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"beta2": 1.0},
        {"schedule": "x"},
        {"micro_batch_size": 0},
    ],
)
def test_bad_settings_name_the_key(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
        TrainConfig(**bad)


def test_iterables_of_batches(sequences):
    ids = sequences.input_ids.long()
    source = as_source(
        [{"input_ids": ids[:4], "labels": ids[:4].masked_fill(ids[:4] == 0, -100)}, ids[4:8]], size=4, seed=0, name="text"
    )
    first, second, again = source(0), source(1), source(2)
    assert torch.equal(first.input_ids, again.input_ids) and first.counted == int((ids[:4, 1:] != 0).sum())
    assert second.counted == 4 * 7
    with pytest.raises(ValueError, match=r"^text: got an iterable with no batches"):
        as_source(iter([]), size=4, seed=0, name="text")(0)
    with pytest.raises(ValueError, match=r"^text: got int"):
        as_source(3, size=4, seed=0, name="text")
    with pytest.raises(ValueError, match=r"^text: got input_ids of shape"):
        as_source([torch.zeros(3)], size=4, seed=0, name="text")(0)
