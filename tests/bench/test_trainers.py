"""The examples' losses and gradients are those of the trainers that they stand in, at a vocabulary where the kernels run."""

from pathlib import Path

import open_unlearning
import pytest
import trainers
from undo_kernels import recorded

ENTRIES = 4096
PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "trainers.md"


@pytest.fixture
def contest(monkeypatch, tmp_path):
    """Builds a contest by its name."""
    monkeypatch.syspath_prepend(str(trainers.EXAMPLES))

    def build(name):
        package, made = trainers.CONTESTS[name]
        if package is not None:
            pytest.importorskip(package)
        return made(ENTRIES, str(tmp_path))

    return build


@pytest.mark.parametrize("name", trainers.CONTESTS)
def test_the_loss_is_the_trainers_own(contest, name):
    found = contest(name)
    with found.trained(), recorded() as calls:
        loss, gradient = trainers.compare(found)
    assert loss < trainers.TOLERANCE and gradient < trainers.TOLERANCE
    assert calls or name == "OpenUnlearning, RMU"


def test_another_loss_is_found_out(contest, monkeypatch):
    graddiff = open_unlearning.graddiff
    monkeypatch.setitem(open_unlearning.LOSSES, "graddiff", lambda *arguments: 1.001 * graddiff(*arguments))
    found = contest("OpenUnlearning, GradDiff")
    loss, gradient = trainers.compare(found)
    assert loss > trainers.TOLERANCE and gradient > trainers.TOLERANCE


def test_the_page_has_every_trainer_at_both_vocabularies():
    text = PAGE.read_text()
    for vocabulary in trainers.VOCABULARIES:
        for name in trainers.CONTESTS:
            assert f"| {name} | {vocabulary // 1000}k |" in text
