"""Unlearning methods against their published formulas, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_same_function

from undo_core import TrainConfig, UnlearnConfig, unlearn
from undo_core.training import sequence_source
from undo_core.training.loop import accumulate
from undo_core.unlearning import METHODS, RMUConfig


def batches(sequences):
    source = sequence_source(sequences, 12, 3)
    forget, retain = source(0), source(1)
    return {"forget": forget, "retain": retain}, {"forget": forget.counted, "retain": retain.counted}


def token_losses(model, batch, kind):
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    labels = batch.input_ids[:, 1:]
    keep = labels != 0
    if kind == "ce":
        return F.cross_entropy(logits[keep], labels[keep])
    uniform = torch.full_like(logits, 1 / logits.shape[-1])
    return (uniform * (uniform.log() - logits.log_softmax(-1))).sum(-1)[keep].mean()


@pytest.mark.parametrize("method", ["maxent", "graddiff"])
def test_token_losses(tiny, sequences, method):
    model = tiny()
    data, counted = batches(sequences)
    got = METHODS[method](model, UnlearnConfig(method=method, retain_weight=3.0)).loss(model, data, counted)

    def written(model):
        forget = token_losses(model, data["forget"], "ce" if method == "graddiff" else "uniform")
        return (-forget if method == "graddiff" else forget) + 3 * token_losses(model, data["retain"], "ce")

    assert_same_function(got, written(model), written(copy.deepcopy(model).double()))


@pytest.mark.parametrize("settings", [
    UnlearnConfig(method="maxent"),
    UnlearnConfig(method="graddiff"),
    *(UnlearnConfig(method="rmu", rmu=RMUConfig(normalize=name)) for name in ("all", "masked", "sequence")),
], ids=lambda settings: f"{settings.method}-{settings.rmu.normalize}")  # fmt: skip
def test_micro_batches_do_not_change_the_gradient(tiny, sequences, settings):
    data, counted = batches(sequences)
    data["forget"].mask[3] = False  # a sequence without labels
    counted["forget"] = data["forget"].counted
    gradients, exact = [], torch.float32 if settings.method == "rmu" else torch.float64  # RMU's targets are float32
    for micro, dtype in ((5, torch.float32), (None, torch.float32), (None, exact)):
        model = tiny().to(dtype)
        loss = METHODS[settings.method](model, settings).loss
        accumulate(model, loss, data, counted, micro)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) == len(gradients[2]) > 0
    for parts, whole, exact in zip(*gradients, strict=True):
        assert_same_function(parts, whole, exact)


def test_it_forgets_and_keeps(tiny, sequences):
    from undo_core.data.sequences import Sequences
    from undo_core.evaluation.metrics import evaluate

    low = sequences.input_ids[:, 1] < 7
    forget, retain = Sequences(sequences.input_ids[low], 0), Sequences(sequences.input_ids[~low], 0)
    model = tiny()
    config = UnlearnConfig(train=TrainConfig(steps=120, batch_size=16, lr=5e-3))
    before = evaluate(model, retain)["value"]
    unlearn(model, forget=forget, retain=retain, config=config, progress=False)
    assert evaluate(model, retain)["value"] < before - 0.3
    assert evaluate(model, forget)["value"] > 2.3, "near log 17, uniform"


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: UnlearnConfig(method="amnesia"), "method"),
        (lambda: UnlearnConfig(retain_weight=-1.0), "retain_weight"),
        (lambda: RMUConfig(first_layer=2, target_layer=2), "target_layer"),
        (lambda: RMUConfig(coefficient=0.0), "coefficient"),
        (lambda: RMUConfig(normalize="tokens"), "normalize"),
        (lambda: RMUConfig(direction="normal"), "direction"),
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=f"^{key}: got"):
        make()
