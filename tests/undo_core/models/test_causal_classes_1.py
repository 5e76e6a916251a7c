"""A third of the walk over every causal class: see tests/support/causal_walk.py."""

import pytest
from causal_walk import check, check_page, part


@pytest.mark.parametrize("name", part(0))
def test_losses_and_gradients_are_transformers_own(name):
    check(name)


def test_the_page_counts_every_class():
    check_page()
