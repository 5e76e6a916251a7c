"""Rounded weights are the nearest of their grid; what cannot be rounded is refused."""

import copy
import importlib.util

import numpy as np
import pytest
import torch
from attacked_models import GPT2, SHAPE, torchao, weights
from rounding import gamma

from undo_core.attacks import quantise_
from undo_core.models import build_model


@torchao
@pytest.mark.parametrize(
    ("shape", "bits", "group_size"), [(None, 8, 1), (None, 4, 32), (None, 4, 8), (None, 2, 16), (GPT2, 8, 1), (GPT2, 4, 8)]
)
def test_quantised_weights_are_the_nearest_of_their_grid(world, shape, bits, group_size):
    model = copy.deepcopy(world[4]) if shape is None else build_model(shape, world[0], 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    count = quantise_(model, bits, group_size)
    changed = 0
    for name, parameter in model.named_parameters():
        was, now = (tensor.detach().double().numpy() for tensor in (before[name], parameter))
        if ("h.0" not in name and "proj" not in name) or was.ndim == 1:
            assert np.array_equal(was, now), name
            continue
        if "h.0" in name:  # [in, out]
            was, now = was.T, now.T
        columns = was.shape[1] if bits == 8 else group_size
        was, now = was.reshape(-1, columns), now.reshape(-1, columns)
        scale = np.abs(was).max(1, keepdims=True) / ((2**bits - 1) / 2)
        wanted = scale * np.clip(np.rint(was / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        room = 2 ** (bits - 1) * gamma(8)  # steps, of float32 scales and products
        tie = np.abs(np.abs(was / scale) % 1 - 0.5) < room  # the largest weight of a group may round either way
        off = np.abs(now - wanted) / scale
        assert (off[~tie] < room).all() and (off <= 1 + room).all() and tie.mean() < 1 / columns + 0.01, name
        assert (np.abs(now - was) <= scale * (0.5 + room)).all(), name
        changed += was.size
    assert count == changed > 0


@torchao
def test_a_matrix_that_has_no_whole_groups_is_refused_before_any_change(world):
    model = copy.deepcopy(world[4])
    with pytest.raises(ValueError, match=r"^group_size: got 48, wanted a divisor of the 64 columns of model\.layers\.0"):
        quantise_(model, 4, 48)
    with pytest.raises(ValueError, match=r"^bits: got 9, wanted"):
        quantise_(model, 9)
    assert torch.equal(weights(model), weights(world[4]))


@torchao
def test_a_model_with_matrices_that_cannot_be_rounded_is_refused_before_any_change(world):
    model = build_model({**SHAPE, "model_type": "mixtral", "num_local_experts": 2, "num_key_value_heads": 2}, world[0], 0)
    before = weights(model).clone()
    wanted = r"^model: got MixtralForCausalLM, whose model\.layers\.0\.mlp\.experts\.gate_up_proj \(of 2 such\) is not the"
    with pytest.raises(ValueError, match=wanted):
        quantise_(model, 8)
    assert torch.equal(weights(model), before)


@torchao
def test_coarser_weights_are_further_from_the_model(world):
    ids, outputs = world[1].input_ids.long(), []
    for bits in (8, 4, 2):
        model = copy.deepcopy(world[3])
        quantise_(model, bits, 8)
        outputs.append(float((model(input_ids=ids).logits - world[3](input_ids=ids).logits).detach().abs().mean()))
    assert 0 < outputs[0] < outputs[1] < outputs[2]


def test_a_missing_package_is_one_line(world, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"^kind: got quantise, which needs .*; pip install 'undo-core\[attacks\]'"):
        quantise_(world[4], 4)
