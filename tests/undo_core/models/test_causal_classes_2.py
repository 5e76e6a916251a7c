"""A third of the walk over every causal class: see tests/support/causal_walk.py."""

import pytest
from causal_walk import check, part


@pytest.mark.parametrize("name", part(1))
def test_losses_and_gradients_are_transformers_own(name):
    check(name)
