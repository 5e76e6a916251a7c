"""Two models, parameter by parameter, of which one may have a head of its own."""

import copy

import pytest
import torch
from causal_models import build

from undo_core.models.pairs import on_the_line, paired
from undo_core.models.untying import untied


def test_an_untied_head_is_compared_with_the_matrix_that_the_other_model_ties():
    tied = build("gemma2")
    model = untied(copy.deepcopy(tied))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    pairs = paired(model, tied, "against")
    shared = tied.get_input_embeddings().weight
    assert len(pairs) == len(list(tied.parameters())) + 1
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert pairs[name][1].data_ptr() == shared.data_ptr()
    before = model.lm_head.weight.clone()
    with on_the_line(model, tied, 1.0):
        assert torch.equal(model.lm_head.weight, shared)
    assert torch.equal(model.lm_head.weight, before)


def test_a_tied_head_cannot_move_towards_a_head_of_its_own():
    tied = build("gemma2")
    with pytest.raises(ValueError, match=r"against: got a .*only one has lm_head.weight"):
        paired(tied, untied(copy.deepcopy(tied)), "against")
