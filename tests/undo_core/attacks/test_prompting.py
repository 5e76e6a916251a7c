"""Solved examples before each prompt: what they are, what is scored, and what cannot fit."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from attacked_models import GPT2, SHAPE
from rounding import PATH, gamma

from undo_core.attacks import AttackConfig, few_shot
from undo_core.data.config import DataConfig
from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import RunConfig
from undo_core.pipeline.graph import graph_of


def text_of(ids):
    return "".join("_" if token == 1 else "0123456789+-*/="[token - 2] for token in ids if token)


@pytest.mark.parametrize("shots", [1, 3])
def test_examples_stand_before_each_prompt(world, shots):
    _, forget, retain, _, _ = world
    sequences, counted = few_shot(retain, forget, shots, seed=0, positions=64)
    solved = {text_of(sequence) for sequence in forget.input_ids.tolist()}
    seen = set()
    for before, after, answer, label in zip(retain.input_ids, sequences.input_ids, sequences.answer_mask, counted, strict=True):
        *examples, own = text_of(after.tolist()).strip("_").split("_")
        assert f"_{own}_" == text_of(before.tolist()) and len(examples) == len(set(examples)) == shots
        assert {f"_{example}_" for example in examples} <= solved
        assert text_of(after[answer].tolist()) == own.split("=")[1] + "_"
        assert text_of(after[label].tolist()) == own + "_"
        seen |= set(examples)
    assert len(seen) > 10
    again, other = (few_shot(retain, forget, shots, seed=seed, positions=64)[0].input_ids for seed in (0, 1))
    assert torch.equal(again, sequences.input_ids) and not torch.equal(other, sequences.input_ids)


def test_no_sequence_finds_its_own_answer_among_its_examples(world):
    forget = world[1]
    few = Sequences(forget.input_ids[:4], 0, forget.answer_mask[:4])
    sequences, _ = few_shot(few, few, 3, seed=0, positions=64)
    for sequence in sequences.input_ids.tolist():
        *examples, own = text_of(sequence).strip("_").split("_")
        assert own not in examples and len(examples) == 3
    with pytest.raises(ValueError, match=r"^shots: got 4, wanted at most the 3 different examples"):
        few_shot(few, few, 4, seed=0, positions=64)
    with pytest.raises(ValueError, match=r"^shots: got 11, whose sequences take \d+ positions of the model's 64"):
        few_shot(forget, forget, 11, seed=0, positions=64)
    assert few_shot(forget, forget, 11, seed=0, positions=None)[0].length > 65, "a model without a limit"


@pytest.mark.parametrize(
    ("data", "most"),
    [
        (DataConfig(), 9),
        (DataConfig(kind="arithmetic", length=65), 5),
        (DataConfig(kind="text", length=9, retain=["a"], forget=["b"]), 7),
    ],
)
def test_examples_that_cannot_fit_are_refused_before_anything_runs(tmp_path, data, most):
    if data.kind == "text":
        (tmp_path / "text.txt").write_text("one\n")
        data = dataclasses.replace(data, retain=[str(tmp_path / "text.txt")], forget=[str(tmp_path / "text.txt")])

    def plan(shots, model):
        attacks = {"asked": AttackConfig(kind="fewshot", shots=[1, shots])}
        return graph_of(RunConfig("run", str(tmp_path), ModelConfig(model), data=data, attacks=attacks))

    for model in (SHAPE, GPT2):
        assert plan(most, model)
        with pytest.raises(
            ValueError, match=rf"^attacks\.asked\.shots: got {most + 1}, .* of the model's 64; wanted {most} at most"
        ):
            plan(most + 1, model)
    assert plan(1000, {"model_type": "bloom"}), "which has no limit"


def test_prompted_text_is_scored_on_its_own_labels(world):
    _, forget, retain, model, _ = world
    text = Sequences(retain.input_ids[:6], 0, starts=retain.input_ids[:6] == 1)
    sequences, counted = few_shot(text, forget, 2, seed=0, positions=64)
    assert sequences.starts is None, "isolated documents would not see the examples"
    got = evaluate(model, sequences, counted=counted)
    total = labels = 0
    wide = copy.deepcopy(model).double()
    for sequence, before in zip(sequences.input_ids.long(), text.input_ids, strict=True):
        own = int((before != 0).sum()) - 1
        logits = wide(input_ids=sequence[sequence != 0][None]).logits[0]
        total += float(F.cross_entropy(logits[-own - 1 : -1].detach(), sequence[sequence != 0][-own:], reduction="sum"))
        labels += own
    assert got["value"] == pytest.approx(total / labels, rel=gamma(PATH)) and got["n"] == 6
