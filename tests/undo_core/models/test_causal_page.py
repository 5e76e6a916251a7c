"""The page that counts the causal classes, docs/models.md, is right."""

from causal_class_losses import check_page


def test_the_page_counts_every_class():
    check_page()
