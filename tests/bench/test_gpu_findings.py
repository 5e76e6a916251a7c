"""The page on the GPU kernels has the counts that are recorded and the times that the cost model predicts."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["instructions", "predictions"])
def test_the_page_has_what_the_command_writes(monkeypatch, name):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module, harness = importlib.import_module(name), importlib.import_module("harness")
    page = module.PAGE.read_text()
    assert harness.with_block(page, name, module.block()) == page, f"python bench/{name}.py --write"


def test_a_page_without_marks_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    with pytest.raises(ValueError, match="<!-- predictions -->"):
        importlib.import_module("harness").with_block("text", "predictions", "table")


def test_kernels_before_change_the_predictions_inside_their_block_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    predictions = importlib.import_module("predictions")
    now = predictions.predicted(768, "chunk", False)
    with predictions.kernels_before():
        before = predictions.predicted(768, "chunk", False)
    assert before.rows_per_chunk == 1024 and before.seconds > now.seconds
    assert predictions.predicted(768, "chunk", False) == now
