"""The grid of trials and its growth, and the worst case over all trials of all attacks."""

import itertools
import math

import pytest
from attacked_models import stage_of

from undo_core.attacks import AttackConfig, Trial, worst_of
from undo_core.attacks.grid import explore, extension_of, next_rate


def test_several_data_orders_are_kept_apart_and_the_grid_grows_by_the_worst():
    config = AttackConfig(rates=[1.0, 2.0], evaluate_at=[0, 5], headline_step=5, extend=2, seeds=2, seed=7)
    assert [trial.name for trial in config.trials()] == ["rate-1", "rate-1-seed-1", "rate-2", "rate-2-seed-1"]
    assert [config.at(trial).seed for trial in config.trials()] == [7, 8, 7, 8]
    tried = []

    def curve_of(trial):
        tried.append(trial)
        value = trial.rate / 10 + (0.5 if trial == Trial(rate=2.0, order=1) else 0.0)
        return [{"step": 0, "forget": 0.9}, {"step": 5, "forget": value}]

    curves = explore(config, lambda trials: {trial: curve_of(trial) for trial in trials}, higher_is_better=True)
    assert [(trial.rate, trial.order) for trial in tried] == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1), (4.0, 0), (4.0, 1)]
    assert set(curves) == set(tried), "0.7 at rate 2 in the second order is worse than 0.4 at rate 4: the grid grows once"
    keys = {stage_of(config, trial).key for trial in curves}
    assert len(keys) == 6


def test_the_worst_case_over_all_attacks():
    point = lambda value: {"value": value, "low": value, "high": value, "n": 10}  # noqa: E731
    curve = lambda rate, *values, **more: {  # noqa: E731
        "rate": rate,
        "forget": list(map(point, values)),
        "retain": [point(0.5)] * len(values),
        **more,
    }
    attack = {"steps": [0, 5, 9], "curves": [curve(1e-3, 0.1, 0.3, 0.99), curve(1e-2, 0.1, 0.4, 0.2)]}
    probe = {"steps": [0], "headline_step": 0, "curves": [curve(None, 0.2, setting="int8"), curve(None, 0.6, setting="int4")]}
    entry = {"attack": attack, "attacks": {"rounded": probe}}
    worst = worst_of(entry, {"kind": "accuracy", "headline_step": 5})
    assert worst["attack"] == "rounded" and worst["setting"] == "int4" and worst["forget"] == point(0.6) and worst["step"] == 0
    assert worst["by_attack"]["relearn"] == {"setting": "rate-0.01", "step": 5, "forget": point(0.4), "retain": point(0.5)}
    assert worst_of({"attack": attack}, {"kind": "accuracy", "headline_step": 9})["setting"] == "rate-0.001"
    assert worst_of(entry, {"kind": "loss", "headline_step": 5})["setting"] == "int8"
    assert worst_of({"attack": None}, {"kind": "accuracy", "headline_step": 5}) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_an_evaluation_that_is_not_finite_is_never_the_worst_case(kind, bad):
    higher = kind == "accuracy"
    mild, worst = (0.5, 0.9) if higher else (5.0, 0.9)
    config = AttackConfig(rates=[1.0, 2.0], evaluate_at=[0], headline_step=0, seeds=2)
    found = {Trial(rate=1.0): mild, Trial(rate=2.0): bad, Trial(rate=2.0, order=1): worst}
    for order in itertools.permutations(found):
        assert next_rate(config, {trial: [{"step": 0, "forget": found[trial]}] for trial in order}, higher) == 4.0
        curves = [{"rate": trial.rate, "forget": [{"value": found[trial]}], "retain": [{"value": 0.0}]} for trial in order]
        one = worst_of({"attack": {"steps": [0], "curves": curves}}, {"kind": kind, "headline_step": 0})
        each = {str(i): {"steps": [0], "headline_step": 0, "curves": [curve]} for i, curve in enumerate(curves)}
        several = worst_of({"attacks": each}, {"kind": kind, "headline_step": 0})
        assert one["forget"]["value"] == several["forget"]["value"] == worst
    for order in itertools.permutations([(1.0, bad), (2.0, worst), (4.0, mild)]):
        assert extension_of(dict(order), higher) is None
