"""The worst case over the trials that leave the model useful, against values computed by hand."""

import copy

import pytest

from undo_core.attacks import worst_of
from undo_core.attacks.grid import bounded_worst


def scores(*values):
    return [{"value": value, "low": value, "high": value, "n": 10} for value in values]


def results(*, kind="accuracy", margin=0.05):
    """A model with retain 0.9 and forget 0.1 before the attack, and attacks that recover more the more they harm it."""
    entry = {
        "metrics": {"retain": scores(0.9)[0], "forget": scores(0.1)[0]},
        "attack": {
            "steps": [0, 10, 20, 40],
            "curves": [
                {"rate": 1e-3, "forget": scores(0.1, 0.2, 0.3, 0.99), "retain": scores(0.9, 0.88, 0.84, 0.9)},
                {"rate": 4e-3, "forget": scores(0.1, 0.4, 0.8, 0.9), "retain": scores(0.9, 0.85, 0.5, 0.1)},
            ],
        },
        "attacks": {
            "pruned": {
                "headline_step": 0,
                "steps": [0],
                "curves": [{"rate": None, "setting": "share-0.5", "forget": scores(0.35), "retain": scores(0.86)}],
            },
            "merged": {
                "needs_original": True,
                "headline_step": 0,
                "steps": [0],
                "curves": [{"rate": None, "setting": "weight-1", "forget": scores(1.0), "retain": scores(1.0)}],
            },
        },
    }
    if kind == "loss":  # the same order, with losses
        turned = lambda values: [{**one, "value": 1 / one["value"]} for one in values]  # noqa: E731
        entry["metrics"] = {name: turned([one])[0] for name, one in entry["metrics"].items()}
        for attack in (entry["attack"], *entry["attacks"].values()):
            for curve in attack["curves"]:
                curve |= {part: turned(curve[part]) for part in ("forget", "retain")}
    return entry, {"kind": kind, "headline_step": 20, **({} if margin is None else {"retain_margin": margin})}


@pytest.mark.parametrize(
    ("margin", "attack", "setting", "step", "forget"),
    [
        (0.0, None, None, 0, 0.1),  # every trial harms the model: the attacker does nothing
        (0.03, "relearn", "rate-0.001", 10, 0.2),
        (0.045, "pruned", "share-0.5", 0, 0.35),
        (0.0501, "relearn", "rate-0.004", 10, 0.4),  # stopped before it destroys the model
        (0.5, "relearn", "rate-0.004", 20, 0.8),  # not step 40, which lies beyond the headline step
    ],
)
def test_only_trials_within_the_margin_count(margin, attack, setting, step, forget):
    entry, metric = results(margin=margin)
    found = bounded_worst(entry, metric)
    assert (found["attack"], found["setting"], found["step"], found["forget"]["value"]) == (attack, setting, step, forget)


def test_a_margin_on_losses_is_relative():
    entry, metric = results(kind="loss", margin=0.03)
    assert bounded_worst(entry, metric)["forget"]["value"] == 5.0, "1 / 0.88 is 2.3 % above 1 / 0.9, and 1 / 0.86 4.7 %"
    assert bounded_worst(*results(kind="loss", margin=0.048))["attack"] == "pruned"


def test_it_stands_beside_the_worst_case_which_leaves_out_who_has_the_original():
    entry, metric = results(margin=None)
    worst = worst_of(entry, metric)
    assert (worst["attack"], worst["setting"], worst["forget"]["value"]) == ("relearn", "rate-0.004", 0.8)
    assert "bounded" not in worst and worst["by_attack"]["merged"]["forget"]["value"] == 1.0
    entry, metric = results(margin=0.045)
    assert worst_of(entry, metric) == {**worst, "bounded": bounded_worst(entry, metric)}
    alone = copy.deepcopy(entry)
    alone["attack"], alone["attacks"] = None, {"merged": entry["attacks"]["merged"]}
    assert worst_of(alone, metric) is None
