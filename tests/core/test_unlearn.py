"""The unlearning methods against their published formulas, written out."""

import copy

import pytest
import torch
import torch.nn.functional as F

from undo_core import TrainConfig, UnlearnConfig, ops, unlearn
from undo_core.training import rows_source
from undo_core.training.loop import _accumulate
from undo_core.unlearn import METHODS, RMUConfig


def batches(rows):
    source = rows_source(rows, 12, 3)
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
def test_token_losses(tiny, rows, method):
    model = tiny()
    data, counted = batches(rows)
    got = METHODS[method](model, UnlearnConfig(method=method, retain_weight=3.0)).loss(model, data, counted)
    forget = token_losses(model, data["forget"], "ce" if method == "graddiff" else "uniform")
    wanted = (-forget if method == "graddiff" else forget) + 3 * token_losses(model, data["retain"], "ce")
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_rmu(tiny, rows):
    model = tiny()
    config = UnlearnConfig(
        method="rmu", retain_weight=2.0, rmu=RMUConfig(target_layer=2, coefficient=6.5), train=TrainConfig(seed=4)
    )
    method = METHODS["rmu"](model, config)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in method.parameters:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    data, counted = batches(rows)

    def hidden(model, batch):  # hidden_states counts the embeddings as 0
        return model(input_ids=batch.input_ids, output_hidden_states=True).hidden_states[2][:, 1:][batch.mask[:, 1:]]

    direction = ops.misdirection(16, 4)
    forget = ((hidden(model, data["forget"]) - 6.5 * direction) ** 2).mean()
    retain = ((hidden(model, data["retain"]) - hidden(frozen, data["retain"]).detach()) ** 2).mean()
    got = method.loss(model, data, counted)
    torch.testing.assert_close(got, forget + 2 * retain, rtol=1e-4, atol=1e-6)
    names = {name for name, p in model.named_parameters() if any(p is q for q in method.parameters)}
    assert names == {"model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize("method", ["maxent", "graddiff", "rmu"])
def test_micro_batches_do_not_change_the_gradient(tiny, rows, method):
    data, counted = batches(rows)
    gradients = []
    for micro in (None, 5):
        model = tiny()
        loss = METHODS[method](model, UnlearnConfig(method=method)).loss
        _accumulate(model, loss, data, counted, micro)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


def test_it_forgets_and_keeps(tiny, rows):
    from undo_core.data.rows import Rows
    from undo_core.evaluate import evaluate

    low = rows.input_ids[:, 1] < 7
    forget, retain = Rows(rows.input_ids[low], 0), Rows(rows.input_ids[~low], 0)
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
    ],
)
def test_bad_settings_are_named(make, key):
    with pytest.raises(ValueError, match=f"^{key}: got"):
        make()


def test_rmu_refuses_what_the_model_has_not(tiny):
    with pytest.raises(ValueError, match=r"^rmu\.target_layer: got 3, wanted at most the model's 2"):
        METHODS["rmu"](tiny(), UnlearnConfig(method="rmu", rmu=RMUConfig(target_layer=3)))
    with pytest.raises(ValueError, match=r"^rmu\.trained: got 'nothing'"):
        METHODS["rmu"](tiny(), UnlearnConfig(method="rmu", rmu=RMUConfig(trained="nothing")))
