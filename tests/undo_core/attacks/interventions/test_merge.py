"""Merging: the ends of the line are the two models exactly, and a point between is the float64 mean of their weights."""

import copy

import pytest
import torch
from two_models import text, two_models

from undo_core.attacks.interventions import Given, intervened
from undo_core.attacks.interventions.merge import Merge
from undo_core.evaluation.metrics import evaluate
from undo_core.models.pairs import on_the_line


def test_the_ends_are_the_models_and_a_point_between_is_their_mean():
    original, model = two_models()
    test = text(3)
    losses = {}
    for weight in (0.0, 0.3, 1.0):
        merged = copy.deepcopy(model)
        with intervened(merged, Merge(weights=[weight]), Given(test, test, lambda: original)) as score:
            losses[weight] = score(merged, test)["value"]
        for own, a, b in zip(merged.parameters(), model.parameters(), original.parameters(), strict=True):
            wanted = (1 - weight) * a.double() + weight * b.double()
            torch.testing.assert_close(own.double(), wanted, rtol=1e-6, atol=1e-6)
    assert losses[0.0] == evaluate(model, test)["value"] and losses[1.0] == evaluate(original, test)["value"]
    assert losses[0.3] not in (losses[0.0], losses[1.0])


def test_another_architecture_is_refused_and_the_line_is_left_again():
    original, model = two_models()
    _, wider = two_models(intermediate_size=24)
    before = copy.deepcopy(model.state_dict())
    with (
        pytest.raises(
            ValueError, match=r"^against: got model\.layers\.0\.mlp\.gate_proj\.weight of shape \(24, 16\), wanted that"
        ),
        on_the_line(model, wider, 0.5),
    ):
        pass
    _, shallow = two_models(num_hidden_layers=2)
    with pytest.raises(
        ValueError, match=r"^original: got .*, only one has model\.layers\.2\..* wanted models of one architecture"
    ):
        Merge(weights=[0.5]).apply(model, Given(text(0), text(0), lambda: shallow))
    with on_the_line(model, original, 0.5):
        assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
