"""Which tokens are characteristic, which sequences are near, and the erasure of rows, against float64 by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.data import characteristic as characteristic_text
from undo_core.data.characteristic import characteristic, nearest
from undo_core.data.sequences import Sequences
from undo_core.noise.erase import EraseConfig, erase_

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def sequences(rows, length=6):
    ids = torch.zeros(len(rows), length, dtype=torch.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
    return Sequences(ids, 0, lengths=torch.tensor([len(row) for row in rows]))


FORGET = [[1, 5, 5, 7], [1, 5, 3], [1, 5, 7, 5, 2, 3]]
RETAIN = [[1, 2, 3], [1, 2, 2, 4], [1, 5, 2, 3], [1, 7, 7, 3], [1, 2, 2, 4]]


def by_hand(vocabulary):
    """Returns the score of each token by the formula of the module, with Python's floats."""
    counts = [Counter(token for row in text for token in row) for text in (FORGET, RETAIN)]
    totals = [sum(count.values()) + 0.5 * vocabulary for count in counts]
    odds = [
        [(c[token] + 0.5) / (total - c[token] - 0.5) for token in range(vocabulary)]
        for c, total in zip(counts, totals, strict=True)
    ]
    return [math.log(f) - math.log(r) for f, r in zip(*odds, strict=True)]


def test_characteristic_tokens():
    found, scores = characteristic(sequences(FORGET), sequences(RETAIN), 9), by_hand(9)
    there = sorted({token for row in FORGET for token in row})
    assert found.dtype == torch.float64 and np.allclose(found[there].numpy(), [scores[token] for token in there], rtol=1e-12)
    assert all(found[token] == -math.inf for token in range(9) if token not in there), "padding too, although its id is 0"
    assert int(found.argmax()) == 5 and found[2] < 0


def test_a_token_that_only_the_forget_text_has_comes_before_a_frequent_one():
    forget, retain = [[1, 3, 3, 3, 3, 9]] * 50, [[1, 3, 3, 3, 4, 4]] * 50
    assert characteristic(sequences(forget), sequences(retain), 10).argsort(descending=True)[:2].tolist() == [9, 3]


@pytest.mark.parametrize("rows", [2, 4096])
def test_nearest_sequences(rows, monkeypatch):
    monkeypatch.setattr(characteristic_text, "ROWS", rows)  # a block, of which the last is not full
    ratios = by_hand(vocabulary=8)
    means = [sum(ratios[token] for token in row) / len(row) for row in RETAIN]
    order = sorted(range(len(RETAIN)), key=lambda i: -means[i])
    for share, count in ((0.4, 2), (0.01, 1), (1.0, 5)):
        assert nearest(sequences(RETAIN), sequences(FORGET), share).tolist() == sorted(order[:count])
    assert order[0] in (2, 3), "those with 5 or 7"


def model_of(tied, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, tie_word_embeddings=tied), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("fill", ["mean", "redraw"])
def test_erasure(tied, fill, dtype):
    model, tokens = model_of(tied, dtype), torch.tensor([7, 2, 39])
    before = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    erase_(model, tokens, fill=fill, seed=5)
    after = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    erased = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    stays = np.setdiff1d(np.arange(40), tokens.numpy())
    for name, value in after.items():
        if name not in erased:
            assert np.array_equal(value, before[name]), name
            continue
        assert np.array_equal(value[stays], before[name][stays])
        rows, kept = value[tokens.numpy()], before[name][stays]
        if fill == "mean":
            unit = 2**-8 if dtype == torch.bfloat16 else 2**-24
            assert np.abs(rows - kept.mean(0)).max() <= unit * np.abs(kept.mean(0)).max()
        else:
            scale = math.sqrt(np.square(kept).mean())
            assert np.abs(rows.mean()) < 4 * scale / math.sqrt(rows.size)
            assert np.square(rows).mean() == pytest.approx(scale**2, rel=4 * math.sqrt(2 / rows.size)), "48 draws"
    other = model_of(tied, dtype)
    erase_(other, tokens, fill=fill, seed=6)
    again = {name: p.detach().double().numpy() for name, p in other.named_parameters()}
    assert all(np.array_equal(again[name], after[name]) == (fill == "mean") for name in erased), "the seed draws the rows"


@pytest.mark.parametrize("tokens", [[], [3, 3], [40], [-1], [[1]], list(range(40))], ids=str)
def test_wrong_tokens_are_refused(tokens):
    model = model_of(True)
    before = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match="tokens: got"):
        erase_(model, torch.tensor(tokens, dtype=torch.int64))
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match=r"erase\.tokens: got -1, wanted an integer >= 0"):
        EraseConfig(tokens=-1)
    with pytest.raises(ValueError, match=r"erase\.fill"):
        EraseConfig(fill="zero")
