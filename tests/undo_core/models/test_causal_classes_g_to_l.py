"""Losses and gradients of every causal class from g to l (the check is in tests/support/causal_class_losses.py)."""

import pytest
from causal_class_losses import check, model_types


@pytest.mark.parametrize("name", model_types("g", "l"))
def test_losses_and_gradients_are_transformers_own(name):
    check(name)
