import copy
import math

import pytest
import torch
import torch.nn.functional as F
from rounding import PATH, gamma

from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy


@pytest.fixture
def half_trained(tiny, sequences):
    model = tiny()
    config = TrainConfig(steps=150, batch_size=32, lr=1e-2)
    train(
        model,
        lambda m, b, c: cross_entropy(m, b["t"], c["t"]),
        {"t": sequence_source(sequences, 32, 0)},
        config,
        progress=False,
    )
    return model


def test_accuracy_is_that_of_greedy_decoding(half_trained, sequences):
    right = 0
    for ids, answer in zip(sequences.input_ids.long(), sequences.answer_mask, strict=True):
        first, wanted = int(answer.nonzero()[0]), ids[answer].tolist()
        out = half_trained.generate(
            ids[None, :first], max_new_tokens=len(wanted), do_sample=False, pad_token_id=0, eos_token_id=1
        )
        right += out[0, first:].tolist() == wanted
    assert 0 < right < len(sequences), "the model must be half right for this to show anything"
    for batch_size in (7, 512):
        assert evaluate(half_trained, sequences, batch_size=batch_size)["value"] == pytest.approx(right / len(sequences))


def test_cross_entropy_is_the_mean_over_tokens(half_trained, sequences):
    text = Sequences(sequences.input_ids, sequences.pad_id)
    ids = sequences.input_ids.long()
    logits = copy.deepcopy(half_trained).double()(input_ids=ids).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    got = evaluate(half_trained, text)
    assert (
        got["value"] == pytest.approx(float(wanted), rel=gamma(PATH))
        and got["low"] < got["value"] < got["high"]
        and got["n"] == 100
    )


def test_wilson_interval(half_trained, sequences):
    got = evaluate(half_trained, sequences)
    p, n, z = got["value"], 100, 1.959964
    for bound in (got["low"], got["high"]):  # at the interval's ends p is z standard errors away
        assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), rel=1e-6)


def test_groups_are_scored_apart(half_trained, sequences):
    group = torch.arange(100) % 3
    grouped = Sequences(sequences.input_ids, 0, sequences.answer_mask, group, ("a", "b", "c"))
    got = evaluate(half_trained, grouped)
    total = sum(score["value"] * score["n"] for score in got["groups"].values())
    assert total == pytest.approx(got["value"] * 100) and list(got["groups"]) == ["a", "b", "c"]


def test_repeats_run_once_and_nothing_after_the_last_answer_runs(half_trained, sequences):
    rows = sequences.take(torch.arange(100) % 40)  # 40 different ones at most
    mask = rows.answer_mask.clone()
    for row in range(0, 100, 3):  # of every third, only the first token of the answer is scored
        mask[row, int(rows.answer_mask[row].int().argmax()) + 1 :] = False
    rows = Sequences(rows.input_ids, 0, mask, torch.arange(100) % 2, ("even", "odd"))
    wanted = [evaluate(half_trained, rows.take(slice(row, row + 1)), batch_size=1)["value"] for row in range(100)]
    assert 0 < sum(wanted) < 100
    read = []
    hook = half_trained.get_input_embeddings().register_forward_hook(lambda module, given, out: read.append(given[0].shape))
    got = evaluate(half_trained, rows, batch_size=1)
    hook.remove()
    different = {(tuple(ids), int(answer.nonzero()[-1])) for ids, answer in zip(rows.input_ids.tolist(), mask, strict=True)}
    assert sorted(shape[1] for shape in read) == sorted(last for _, last in different) and len(different) < 100
    assert got["value"] == pytest.approx(sum(wanted) / 100)
    assert got["groups"]["odd"]["value"] == pytest.approx(sum(wanted[1::2]) / 50)
