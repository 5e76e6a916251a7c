"""A line of progress comes when a stage starts or continues, before the work that may take minutes."""

import pytest
import torch
from torch import nn

from undo_core.io import progress
from undo_core.io.progress import Board, StageProgress
from undo_core.training import Batch, TrainConfig, train


@pytest.mark.parametrize(("start", "line"), [(0, "unlearn: starts"), (40, "unlearn: continues from 40 of 60")])
def test_a_stage_speaks_when_it_begins(capsys, monkeypatch, start, line):
    monkeypatch.setattr(progress, "_show", Board().show)
    with StageProgress("unlearn", 60, start=start) as bar:
        assert capsys.readouterr().out == f"{line}\n"
        bar.update(start + 1, 1, None)
    assert capsys.readouterr().out == ""


def test_a_training_speaks_before_its_first_evaluation(monkeypatch):
    shown, seen = [], []
    monkeypatch.setattr(progress, "_show", shown.append)
    model = nn.Linear(2, 1)

    def evaluate(_):
        seen.append([(update.step, update.done) for update in shown])
        return {}

    source = {"text": lambda step: Batch(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool))}
    loss = lambda model, batches, counted: model(batches["text"].input_ids.float()).square().sum()  # noqa: E731
    train(model, loss, source, TrainConfig(steps=1, batch_size=2), evaluate=evaluate, title="small")
    assert seen[0] == [(0, False)] and shown[-1].done
