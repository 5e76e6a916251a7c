"""The gate of filter-then-distill learns from a few labelled sequences, and depends on them alone."""

import math
import random

import pytest
import torch

from undo_core.data.sequences import Sequences
from undo_core.distillation.gate import Classifier, GateConfig, features, fit_classifier, labelled

PAD = 0


def spoken(tokens, count, seed, length=20) -> Sequences:
    """Returns sequences of random tokens of one kind, with different lengths."""
    draw = random.Random(seed)
    ids = torch.zeros(count, length, dtype=torch.int32)
    for sequence in range(count):
        used = draw.randint(length // 2, length)
        ids[sequence, :used] = torch.tensor([draw.choice(tokens) for _ in range(used)])
    return Sequences(ids, PAD)


def test_a_small_sample_tells_overlapping_kinds_apart():
    retain, forget = spoken(range(1, 60), 2000, 1), spoken(range(40, 100), 2000, 2)
    few = [labelled(sequences, 0.01, 7) for sequences in (forget, retain)]
    assert [len(sequences) for sequences in few] == [20, 20]
    classifier = fit_classifier(*few)
    quality = classifier.quality(spoken(range(40, 100), 500, 3), spoken(range(1, 60), 500, 4))
    assert quality["recall"] > 0.9 and quality["precision"] > 0.9
    same = fit_classifier(*(labelled(sequences, 0.01, 7) for sequences in (forget, retain)))
    assert torch.equal(classifier.weight, same.weight) and torch.equal(classifier.bias, same.bias)
    assert not torch.equal(
        classifier.weight, fit_classifier(*(labelled(sequences, 0.01, 8) for sequences in (forget, retain))).weight
    )


def test_the_order_of_tokens_is_seen():
    """Both kinds have the same tokens, so that only pairs tell them apart."""
    rising = torch.arange(1, 17).repeat(8, 1)
    forget, retain = (Sequences(ids.int(), PAD) for ids in (rising, rising.flip(1)))
    classifier = fit_classifier(forget, retain)
    assert classifier.forget(forget).all() and not classifier.forget(retain).any()


def test_features_against_a_count_by_hand():
    ids = torch.tensor([[3, 5, 3, PAD, PAD], [3, 5, PAD, PAD, PAD]], dtype=torch.int32)
    found = features(ids, ids != PAD, 1 << 16)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # 3 twice, 5 once, pairs 3 5 and 5 3
    counts = torch.tensor([math.log(3), math.log(2), math.log(2), math.log(2)], dtype=torch.float64)
    wanted = (counts / counts.norm()).sort().values
    torch.testing.assert_close(found[0][found[0] > 0].sort().values, wanted)
    torch.testing.assert_close(found[1][found[1] > 0], torch.full((3,), 1 / math.sqrt(3), dtype=torch.float64))
    longer = torch.cat([ids, torch.zeros(2, 4, dtype=torch.int32)], 1)
    assert torch.equal(features(longer, longer != PAD, 1 << 16), found), "padding counts for nothing"


def test_the_fit_is_the_minimum():
    """At the minimum of the penalised loss its gradient vanishes; the gradient is computed here by hand."""
    forget, retain = spoken(range(30, 60), 40, 1), spoken(range(1, 40), 60, 2)
    config = GateConfig(buckets=256, penalty=1e-3)
    classifier = fit_classifier(forget, retain, config)
    x = torch.cat([features(sequences.input_ids, sequences.text_mask(), 256) for sequences in (forget, retain)])
    y = torch.cat([torch.ones(40), torch.zeros(60)]).double()
    residual = 1 / (1 + torch.exp(-(x @ classifier.weight + classifier.bias))) - y
    assert float((x.T @ residual / 100 + 2 * 1e-3 * classifier.weight).abs().max()) < 1e-5
    assert abs(float(residual.mean())) < 1e-5


def test_precision_and_recall():
    """The weights classify a sequence as forget if it has token 9."""
    weight = features(torch.tensor([[9]]), torch.tensor([[True]]), 4096)[0]
    classifier = Classifier(weight, torch.tensor(-0.1, dtype=torch.float64))
    forget, retain = (Sequences(torch.tensor(ids), PAD) for ids in ([[9], [9], [9], [2]], [[9], [3], [4], [5]]))
    quality = classifier.quality(forget, retain)
    assert quality == {"precision": 0.75, "recall": 0.75, "forget_rows": 4, "retain_rows": 4}
    silent = Classifier(torch.zeros_like(weight), torch.tensor(-1.0, dtype=torch.float64))
    assert silent.quality(forget, retain)["precision"] is None


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"share": 1.5}, "share"), ({"alphas": [0.5, 0.5]}, "alphas"), ({"alphas": [2]}, "alphas"), ({"penalty": 0}, "penalty")],
)
def test_bad_settings_are_refused(settings, name):
    with pytest.raises(ValueError, match=rf"^gate\.{name}: got .*, wanted"):
        GateConfig(**settings)
