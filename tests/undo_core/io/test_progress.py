"""A line of progress comes when a stage starts or continues, before the work that may take minutes."""

import io
import sys

import pytest
import torch
from torch import nn

from undo_core.io import progress
from undo_core.io.progress import Board, StageProgress, Unit, console, show_every_character, shown_in
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


def test_performances_are_shown_in_the_unit_of_their_stage(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_show", Board(every=-1.0).show)
    units = {"relearn a": Unit("nats/byte", {"forget": 0.5})}
    with shown_in(lambda title: units.get(title, Unit())):
        for title in ("relearn a", "unlearn"):
            with StageProgress(title, 60) as bar:
                bar.update(1, 1, None, {"retain": 3.0, "forget": 2.5, "forget_low": 2.0})
    attacked, trained = (line for line in capsys.readouterr().out.splitlines() if "1/60" in line)
    assert attacked.endswith("  retain 3.000  forget 1.250 nats/byte") and trained.endswith("  retain 3.000  forget 2.500")
    assert progress.shown_metrics("relearn a", {"forget": 2.5}) == "forget 2.500", "restored"


def test_a_character_that_the_output_cannot_hold_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    show_every_character()
    console.print("한국어 α ±")
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").split() == [r"\ud55c\uad6d\uc5b4", r"\u03b1", "±"]
