"""Pruning and rounding against definitions in float64 that share nothing with them."""

import copy

import pytest
import torch
from two_models import text, two_models

from undo_core.attacks.interventions import Given
from undo_core.attacks.interventions.prune import Prune, kth_smallest
from undo_core.attacks.interventions.round import Round
from undo_core.attacks.matrices import matrices_of

GIVEN = Given(text(0), text(1), lambda: pytest.fail("pruning and rounding read no other model"))


def matrices(model):
    """Returns the linear layers' weights by transformers' names, found without the code under test."""
    return {name: value for name, value in model.named_parameters() if value.ndim == 2 and "embed" not in name}


@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_smallest_weights_become_zero(scope, share):
    _, model = two_models()
    pruned = copy.deepcopy(model)
    Prune(shares=[share], scopes=[scope]).apply(pruned, GIVEN)
    before, after = matrices(model), matrices(pruned)
    assert len(before) == 4 * 7
    groups = [[name] for name in before] if scope == "matrix" else [list(before)]
    for names in groups:
        sizes = torch.cat([before[name].detach().double().abs().flatten() for name in names])
        kept = torch.cat([after[name].detach().flatten() for name in names])
        order = sizes.argsort(stable=True)
        count = round(share * len(sizes))
        assert (kept[order[:count]] == 0).all() and (kept[order[count:]] != 0).all()
        own = torch.cat([before[name].detach().flatten() for name in names])
        assert torch.equal(kept[order[count:]], own[order[count:]])
    changed = {
        name for name, value in pruned.named_parameters() if not torch.equal(value, dict(model.named_parameters())[name])
    }
    assert changed == (set(before) if share else set())


def test_the_kth_smallest_is_that_of_a_sort():
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-38, 2.0, -2.0, 3.4e38, 0.5])
    ordered = values.abs().sort().values
    for k in range(1, 9):
        assert kth_smallest([values[:3], values[3:].view(1, 5)], k) == float(ordered[k - 1])
    assert kth_smallest([values], 0) < 0


@pytest.mark.parametrize(("bits", "size"), [(1, 0), (2, 0), (3, 8), (4, 16)])
def test_weights_are_the_nearest_of_evenly_spaced_values(bits, size):
    _, model = two_models()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = 0.25  # a row of equal values
    rounded = copy.deepcopy(model)
    Round(bits=[bits], group_size=size).apply(rounded, GIVEN)
    after = matrices(rounded)
    for name, value in matrices(model).items():
        own = value.detach().double().reshape(-1, size or value.shape[1])
        low, high = own.min(1, keepdim=True).values, own.max(1, keepdim=True).values
        levels = low + (high - low) * torch.linspace(0, 1, 2**bits, dtype=torch.float64)
        nearest = (own[:, :, None] - levels[:, None]).abs().min(2).values
        got = after[name].detach().double().reshape(own.shape)
        span = (high - low).max()
        assert ((own - got).abs() <= nearest + 1e-6 * span).all()
        assert (got[:, :, None] - levels[:, None]).abs().min(2).values.max() <= 1e-6 * span.clamp_min(1)
    assert (after["model.layers.0.mlp.up_proj.weight"][3] == 0.25).all()


def test_what_does_not_suit_the_model_is_refused_before_anything_changes():
    _, model = two_models()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^group_size: got 5, wanted a divisor of the 16 columns of model\.layers\.0"):
        Round(bits=[2], group_size=5).apply(model, GIVEN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for wrong, message in (
        (lambda: Round(bits=[9]), "bits: got .9., wanted different numbers from 1 to 8"),
        (lambda: Prune(scopes=["layer"]), "scopes: got .'layer'., wanted different ones of matrix, global"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_gpt2_matrices_are_rows_of_outputs():
    """GPT-2 stores its matrices transposed; a row is an output there too."""
    _, model = two_models(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=64, num_hidden_layers=1)
    shapes = {name.rpartition(".")[2]: tuple(matrix.shape) for name, matrix in matrices_of(model).items()}
    assert shapes == {"c_attn": (48, 16), "c_proj": (16, 64), "c_fc": (64, 16)}
    weight = model.transformer.h[0].attn.c_attn.weight
    Prune(shares=[1.0], scopes=["matrix"]).apply(model, GIVEN)
    assert (weight == 0).all()
