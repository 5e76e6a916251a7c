"""An attack's own text: the parts of the forget set are apart by content, and what is scored was not trained on."""

import dataclasses
import re

import pytest
import torch
from stage_kinds import NOWHERE

from undo_core.attacks.config import AttackConfig
from undo_core.attacks.relearning import attack
from undo_core.attacks.text import AttackTextConfig, in_part
from undo_core.data.arithmetic import compact_splits
from undo_core.data.sequences import Sequences
from undo_core.pipeline.attack_config import AttackRunConfig, TextConfig
from undo_core.pipeline.stages import Relearn


def texts_of(sequences):
    """The text of every sequence as a tuple of ids; it has no padding, whose id is 0 here."""
    return [tuple(t for t in row if t) for row in sequences.input_ids.tolist()]


@pytest.fixture(scope="module")
def compact():
    return compact_splits(seed=3, train_rows=400, eval_prompts=100)[1]


def chosen(splits, **settings):
    tests = {name: splits[f"test_{name}"] for name in ("forget", "retain")}
    return AttackTextConfig(**settings).choose(splits["train_forget"], splits["train_retain"], tests)


def test_prompts_of_the_other_part_are_scored(compact):
    texts, tests = chosen(compact, forget_part=0.5)
    trained, scored, whole = (set(texts_of(s)) for s in (texts["forget"], tests["forget"], compact["train_forget"]))
    assert len(compact["train_forget"]) > len(whole), "problems occur several times"
    assert trained and scored and not trained & scored and trained | scored < whole
    assert all((text in trained) == (text in texts_of(texts["forget"])) for text in whole)
    assert texts_of(texts["forget"]) == [text for text in texts_of(compact["train_forget"]) if text in trained], "every copy"
    wanted = [text for text in texts_of(compact["test_forget"]) if text in whole - trained]
    assert texts_of(tests["forget"]) == wanted and tests["forget"].answer_mask.any(1).all()
    assert texts["retain"] is compact["train_retain"] and tests["retain"] is compact["test_retain"]
    sizes = [len(set(texts_of(chosen(compact, forget_part=share)[0]["forget"]))) for share in (0.2, 0.5, 0.8)]
    for size, share in zip(sizes, (0.2, 0.5, 0.8), strict=True):
        spread = (share * (1 - share) * len(whole)) ** 0.5
        assert abs(size - share * len(whole)) < 4 * spread
    other = set(texts_of(chosen(compact, forget_part=0.5, seed=1)[0]["forget"]))
    assert other != trained and other & trained


def test_text_is_scored_on_its_other_part():
    draw = torch.Generator().manual_seed(2)
    rows = torch.randint(1, 9, (60, 5), generator=draw, dtype=torch.int32)
    forget = Sequences(torch.cat([rows, rows]), 0)  # each text twice, far apart
    plain = {name: Sequences(rows[:20] + 10, 0) for name in ("forget", "retain")}
    texts, tests = AttackTextConfig(forget_part=0.6).choose(forget, plain["retain"], plain)
    trained, scored = texts_of(texts["forget"]), texts_of(tests["forget"])
    assert not set(trained) & set(scored) and set(trained) | set(scored) <= set(texts_of(forget))
    assert len(scored) == 20, "as many as there are test sequences"
    longer = Sequences(torch.nn.functional.pad(rows, (0, 3)), 0)
    assert in_part(longer, 0.6, 0).equal(in_part(Sequences(rows, 0), 0.6, 0)), "padding is no content"


def test_retain_text_near_the_forget_domain(compact):
    texts, tests = chosen(compact, retain_near=0.1)
    assert len(texts["retain"]) == 40 and set(texts_of(texts["retain"])) <= set(texts_of(compact["train_retain"]))
    assert texts["forget"] is compact["train_forget"] and tests["forget"] is compact["test_forget"]


def test_packed_problems_have_no_part(compact):
    one = compact["train_forget"]
    length = 2 * one.length
    packed = Sequences(one.input_ids.reshape(-1, length), 0, lengths=torch.full((len(one) // 2,), length))
    with pytest.raises(ValueError, match=r"text\.forget_part: got 0\.5, .* which packed sequences and questions do not have"):
        chosen({**compact, "train_forget": packed}, forget_part=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"text": AttackTextConfig(forget_part=0.5), "mix": {"retain": 1.0}},
            "text.forget_part: got 0.5 with a mix without forget",
        ),
        ({"text": AttackTextConfig(retain_near=0.5)}, "text.retain_near: got 0.5 with a mix without retain"),
        ({"text": AttackTextConfig(forget_part=0.5), "kind": "quantise"}, "with kind quantise, which trains nothing"),
    ],
)
def test_settings_that_exclude_each_other(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        AttackConfig(**settings)


@pytest.mark.parametrize("settings", [{"forget_part": 0.0}, {"forget_part": 1.0}, {"retain_near": 0.0}, {"seed": -1}])
def test_wrong_settings(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=rf"text\.{name}: got"):
        AttackTextConfig(**settings)


def test_a_part_is_refused_where_it_would_be_ignored_or_unlike():
    own = AttackConfig(text=AttackTextConfig(forget_part=0.5))
    with pytest.raises(ValueError, match=r"text: got .* wanted none: it is trained on as it is given"):
        attack(None, None, 1e-3, own, evaluate=dict)
    text = TextConfig(retain=["keep.txt"], forget=["forget.txt"])
    with pytest.raises(ValueError, match=r"relearn\.text\.forget_part: got 0\.5, wanted null: checkpoints with different"):
        AttackRunConfig(output="out", data=text, relearn=own)


def test_the_text_is_part_of_the_key():
    def stage(**text):
        config = AttackConfig(rates=[1e-3], mix={"forget": 0.5, "retain": 0.5}, text=AttackTextConfig(**text))
        return Relearn(config=config, prepared=NOWHERE, model=NOWHERE).settings

    assert "text" not in stage(), "keys of attacks without it stay"
    found = [stage(), stage(forget_part=0.5), stage(forget_part=0.6), stage(forget_part=0.5, seed=1), stage(retain_near=0.5)]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])
    assert found[1]["text"] == dataclasses.asdict(AttackTextConfig(forget_part=0.5))
