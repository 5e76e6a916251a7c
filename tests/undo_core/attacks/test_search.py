"""The attacker that searches: its budget, its objective, what it tries, and that it goes on as if it had not been stopped."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import pytest

from undo_core.attacks.config import NEEDS, AttackConfig, LoraConfig
from undo_core.attacks.search import SearchConfig, Tried, best_useful, search, settled_attacks
from undo_core.attacks.text import AttackTextConfig

needs_optuna = pytest.mark.skipif(importlib.util.find_spec("optuna") is None, reason="optuna is not installed")
HEADLINE = AttackConfig(rates=[1e-3, 1e-2], evaluate_at=[0, 10, 100], headline_step=100, batch_size=8, clip=0.5, seeds=2)
CONFIG = SearchConfig(budget=5.0, steps=[30, 100], batch_sizes=[4, 8, 16], seed=3, startup=4).along(HEADLINE)


def score(value):
    return {"value": value, "low": value, "high": value, "n": 10}


def attempt(number: int, attack: AttackConfig):
    """A model that learns fastest at a learning rate of 1e-3 with adamw and loses retain performance with the product of rate and steps."""
    gain = (1.0 if attack.optimizer == "adamw" else 0.5) / (1 + abs(attack.rates[0] - 1e-3) * 1e3)
    return [
        {"step": s, "forget": score(min(0.9, 0.1 + gain * s / 200)), "retain": score(0.9 - attack.rates[0] * s / 20)}
        for s in attack.evaluate_at
    ]


@needs_optuna
def test_the_budget_is_spent_and_never_exceeded():
    """The grid is 2 rates, 2 orders, 100 steps of 8 sequences, 3 passes: 9600; five times that may be spent."""
    assert CONFIG.compute == 5 * 9600
    tried = search(CONFIG, attempt, True)
    costs = [
        each.curve[-1]["step"] * each.point["batch_size"] * (2 if each.point["rank"] else 3) for each in tried
    ]  # by hand, not by the code that counts
    assert [each.spent for each in tried] == [sum(costs[: n + 1]) for n in range(len(costs))]
    assert 0.9 * CONFIG.compute < tried[-1].spent <= CONFIG.compute
    assert len(tried) > CONFIG.startup, "results decided too"
    assert all(CONFIG.steps[0] <= each.curve[-1]["step"] <= CONFIG.steps[1] for each in tried)


@needs_optuna
def test_an_interrupted_search_goes_on_as_if_it_had_not_been():
    whole, kept, calls, stops = search(CONFIG, attempt, True), {}, [], [2, 6]

    def stopping(number, attack):
        if number not in kept:
            if len(calls) in stops and stops.pop(0):
                raise KeyboardInterrupt
            calls.append(number)
            kept[number] = attempt(number, attack)
        return kept[number]

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search(CONFIG, stopping, True)
    assert search(CONFIG, stopping, True) == whole and calls == list(range(len(whole))), "each is computed once"
    assert search(dataclasses.replace(CONFIG, seed=4), attempt, True) != whole


@needs_optuna
def test_later_trials_are_better_than_the_random_ones_on_average():
    tried = search(dataclasses.replace(CONFIG, budget=10.0), attempt, True)
    scores = [each.score(True) for each in tried]
    first, later = scores[: CONFIG.startup], scores[CONFIG.startup :]
    assert sum(later) / len(later) > sum(first) / len(first)


def test_a_trial_that_destroys_the_model_scores_what_doing_nothing_does():
    destroyed = [
        {"step": s, "forget": score(f), "retain": score(r)} for s, f, r in ((0, 0.1, 0.9), (10, 0.8, 0.5), (20, 0.9, 0.1))
    ]
    assert best_useful(destroyed, 0.05, True) == 0 and Tried({}, destroyed, 0, 1).score(True) == 0.1
    in_time = [
        {"step": s, "forget": score(f), "retain": score(r)} for s, f, r in ((0, 0.1, 0.9), (10, 0.6, 0.85), (20, 0.9, 0.1))
    ]
    assert best_useful(in_time, 0.05, True) == 1, "the attacker stops before the damage"
    assert best_useful(in_time, 1.0, True) == 2
    losses = [
        {"step": s, "forget": score(f), "retain": score(r)} for s, f, r in ((0, 9.0, 2.0), (10, 6.0, 2.09), (20, 5.0, 2.2))
    ]
    assert best_useful(losses, 0.05, False) == 1, "relative for a loss"
    diverged = [{"step": s, "forget": score(f), "retain": score(r)} for s, f, r in ((0, 9.0, 2.0), (10, float("nan"), 1.0))]
    assert best_useful(diverged, 0.05, False) == 0


def test_the_attack_of_a_point_has_what_is_searched_and_what_is_held():
    point = {"rate": 2e-3, "steps": 60, "batch_size": 16, "warmup": 0.1, "optimizer": "sgd", "rank": 4, "scaling": 2.0}
    attack = CONFIG.attack({**point, "retain_share": 0.25})
    assert (attack.kind, attack.lora) == ("lora", LoraConfig(rank=4, alpha=8.0)) and attack.clip == 0.5
    assert attack.evaluate_at == [0, 10, 22, 46, 60] and attack.headline_step == 60
    assert attack.sequences() == {"forget": 12, "retain": 4} and (attack.optimizer, attack.warmup) == ("sgd", 6)
    assert (attack.save, attack.seeds, attack.seed, attack.training(2e-3).warmup) == (False, 1, 3, 6)
    whole = CONFIG.attack({**point, "rank": 0, "scaling": None, "retain_share": 0.01, "warmup": 0.0, "steps": 3})
    assert whole.kind == "finetune" and whole.sequences() == {"forget": 16} and whole.evaluate_at == [0, 3]
    assert whole.warmup == 1 and whole.lora == HEADLINE.lora
    assert CONFIG.attack({**point, "retain_share": 1.0}).sequences() == {"retain": 16}, "benign fine-tuning"


def test_a_search_is_like_the_headline_attack_unless_it_names_another():
    other = AttackConfig(rates=[1e-3], evaluate_at=[0, 50], headline_step=50, batch_size=4, precision="bfloat16")
    settled = settled_attacks(
        HEADLINE, {"own": SearchConfig(budget=50, like=other), "plain": SearchConfig(), "mixed": HEADLINE}
    )
    assert settled["own"].compute == 50 * 600 and settled["own"].attack(settled["own"].corners()[0]).precision == "bfloat16"
    assert settled["plain"].like == HEADLINE == settled["relearn"] == settled["mixed"]
    same = SearchConfig(budget=2.0).along(HEADLINE).settings()
    assert same == SearchConfig(budget=1.0).along(dataclasses.replace(HEADLINE, seeds=4)).settings(), "only the compute counts"
    assert same["like"]["clip"] == 0.5 and same["compute"] == 2 * 9600


def test_the_key_of_a_search_tells_every_setting_of_like_that_changes_a_trial():
    """A setting that an attack gains later is told too, or is named here as searched, derived or without effect."""
    other = {
        **{"micro_batch_size": 2, "clip": 2.0, "weight_decay": 0.5, "beta1": 0.5, "precision": "bfloat16"},
        **{"step_in_backward": True, "activation_checkpointing": True, "attention": "eager"},
        **{"lora": LoraConfig(targets=["q_proj"]), "text": AttackTextConfig(forget_part=0.5)},
    }
    decided = {"kind", "rates", "evaluate_at", "ladder", "headline_step", "extend", "mix", "batch_size", "warmup", "optimizer"}
    decided |= {"shots", "bits", "group_size", "save", "together", "seeds", "seed"}
    assert {field.name for field in dataclasses.fields(AttackConfig)} == other.keys() | decided
    plain = SearchConfig(retain_shares=[0.5]).along(HEADLINE).settings()
    for name, value in other.items():
        told = SearchConfig(retain_shares=[0.5]).along(dataclasses.replace(HEADLINE, **{name: value})).settings()
        assert told != plain, name


def test_a_text_that_some_trial_would_not_train_on_is_refused_before_any_trial():
    near = dataclasses.replace(HEADLINE, mix={"forget": 0.5, "retain": 0.5}, text=AttackTextConfig(retain_near=0.1))
    with pytest.raises(ValueError, match=r"text.retain_near: got 0.1 with a mix without retain"):
        SearchConfig().along(near)
    with pytest.raises(ValueError, match=r"text.retain_near: got 0.1 with a mix without retain"):
        SearchConfig(batch_sizes=[1, 8], retain_shares=[0.25]).along(near)
    assert SearchConfig(batch_sizes=[8], retain_shares=[0.25]).along(near).like == near


def test_equal_ends_hold_a_setting():
    config = SearchConfig(rates=[1e-3, 1e-3], steps=[30, 30], budget=5.0, seed=3).along(HEADLINE)
    assert config.steps == [30, 30] and config.rates == [1e-3, 1e-3]
    if importlib.util.find_spec("optuna"):
        points = [each.point for each in search(config, attempt, True)]
        assert len(points) > 2 and {(point["rate"], point["steps"]) for point in points} == {(1e-3, 30)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, "budget: got .* wanted different numbers above 0"),
        ({"rates": [1e-3]}, "rates: got .* wanted the lowest and the highest"),
        ({"rates": [0.0, 1e-3]}, "rates: got .* above 0"),
        ({"steps": [0, 0]}, "steps: got .* above 0"),
        ({"steps": [100, 10]}, "steps: got .* wanted the lowest and the highest"),
        ({"optimizers": []}, "optimizers: got .*, wanted at least one"),
        ({"retain_shares": [1.5]}, "retain_shares: got .* from 0 to 1"),
        ({"startup": 0}, "startup: got 0, wanted at least one"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SearchConfig(**settings)


def test_a_search_that_no_budget_or_precision_allows_is_refused():
    with pytest.raises(ValueError, match=r"budget: got 0.01, wanted at least 0.2, which allows one trial of 10 steps"):
        SearchConfig(budget=0.01).along(HEADLINE)
    with pytest.raises(ValueError, match="optimizer: got sgd with precision bfloat16-stochastic"):
        SearchConfig().along(dataclasses.replace(HEADLINE, precision="bfloat16-stochastic"))
    with pytest.raises(ValueError, match=r"like.kind: got fewshot, which trains nothing"):
        SearchConfig(like=AttackConfig(kind="fewshot")).along(HEADLINE)
    with pytest.raises(ValueError, match=r"like.evaluate_at: got \[0\], wanted at least one step"):
        SearchConfig(like=AttackConfig(evaluate_at=[0], headline_step=0)).along(HEADLINE)


def test_without_optuna_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(NEEDS, "search", "a_package_that_is_nowhere")
    monkeypatch.delitem(sys.modules, "optuna", raising=False)
    with pytest.raises(
        ModuleNotFoundError, match=r"kind: got search, which needs a_package.* pip install 'undo-core\[optuna\]'"
    ):
        search(CONFIG, attempt, True)
