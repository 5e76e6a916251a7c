"""Compute slowdown: crossings of hand-made curves with exact answers, what censoring leaves known, and the ladder of budgets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undo_core.attacks.config import AttackConfig, ladder_of
from undo_core.attacks.slowdown import (
    Interval,
    Trajectory,
    comparable,
    crossing,
    earliest,
    frontier,
    levels_of,
    missing,
    other_text,
    slowdown,
    slowdown_entry,
    slowdowns,
)


def entry(kind, forget, *curves, steps=(0, 10, 100, 1000), cost=2.0, further=None):
    """A model of a results file: its forget performance before any attack, and a curve for each rate."""
    scores = [{"flops": [cost * step for step in steps], "forget": [{"value": v} for v in curve]} for curve in curves]
    attack = {"steps": list(steps), "curves": scores} if curves else None
    return {"name": kind, "kind": kind, "metrics": {"forget": {"value": forget}}, "attack": attack, "attacks": further}


MODELS = [
    entry("original", 0.9),
    entry("unlearn", 0.1, [0.1, 0.6, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]),
    entry("undo", 0.1, [0.1, 0.1, 0.2, 0.4], [0.1, 0.1, 0.55, 0.2]),
    entry("filter", 0.1, [0.1, 0.1, 0.35, 0.75]),
]


def results(models, config=None):
    return {"metric": {"kind": "accuracy"}, "models": models, "config": config}


def test_a_crossing_lies_between_two_evaluations():
    flops = [0, 10, 100, 1000]
    assert crossing(flops, [0.1, 0.2, 0.6, 0.9], 0.5, True) == Interval(10, 100)
    assert crossing(flops, [0.1, 0.2, 0.5, 0.9], 0.5, True) == Interval(10, 100), "reached exactly"
    assert crossing(flops, [0.1, 0.2, 0.6, 0.1], 0.5, True) == Interval(10, 100), "the first time counts"
    assert crossing(flops, [0.5, 0.2, 0.6, 0.9], 0.5, True) == Interval(0, 0), "before any attack"
    assert crossing(flops, [0.1, 0.2, 0.3, 0.4], 0.5, True) == Interval(1000, math.inf), "right-censored"
    assert crossing(flops, [9.0, 8.0, 4.0, math.nan], 5.0, False) == Interval(10, 100), "a smaller loss is better"
    assert crossing(flops, [9.0, math.nan, math.nan, math.nan], 5.0, False) == Interval(1000, math.inf), "it diverged"


def test_the_first_trial_that_reaches_a_level_counts_and_else_the_longest():
    assert earliest([Interval(10, 100), Interval(20, 50)]) == Interval(10, 50)
    assert earliest([Interval(1000, math.inf), Interval(200, 500)]) == Interval(200, 500)
    assert earliest([Interval(20, math.inf), Interval(200, 500)]) == Interval(200, 500), "a short trial is not a longer one"
    assert earliest([Interval(1000, math.inf), Interval(20, math.inf)]) == Interval(1000, math.inf)


def test_a_slowdown_is_an_interval_of_quotients():
    both = slowdown(Interval(10, 20), Interval(100, 200))
    assert (both.ratio, both.value) == (Interval(0.05, 0.2), 0.1)
    at_once = slowdown(Interval(10, 20), Interval(0, 200))
    assert (at_once.ratio, at_once.value) == (Interval(0.05, math.inf), 0.1)
    never = slowdown(Interval(1000, math.inf), Interval(100, 200))
    assert (never.ratio, never.value) == (Interval(5.0, math.inf), None)
    reference_never = slowdown(Interval(10, 20), Interval(1000, math.inf))
    assert (reference_never.ratio, reference_never.value) == (Interval(0.0, 0.02), None)
    neither = slowdown(Interval(1000, math.inf), Interval(1000, math.inf))
    assert neither.unknown and neither.ratio == Interval(0.0, math.inf) and neither.value is None
    before = slowdown(Interval(0, 0), Interval(100, 200))
    assert (before.ratio, before.value) == (Interval(0.0, 0.0), 0.0)
    assert slowdown(Interval(10, 20), Interval(0, 0)).unknown
    first = slowdown(Interval(0, 20), Interval(0, 10))
    assert (first.ratio, first.value) == (Interval(0.0, math.inf), 2.0) and not first.unknown, "both reach it, at no known time"


def test_slowdowns_of_results_by_hand():
    """Levels 0.3, 0.5, 0.7, 0.82; data filtering reaches 0.3 at step 100 and 0.5 and 0.7 at step 1000, two FLOPs a step."""
    levels = levels_of(MODELS, True)
    assert levels == {0.25: pytest.approx(0.3), 0.5: 0.5, 0.75: pytest.approx(0.7), 0.9: pytest.approx(0.82)}
    found = slowdowns(MODELS, True)
    assert list(found) == ["unlearn", "undo", "filter"]
    quarter, half, most, nearly = found["unlearn"].values()
    assert (quarter.amount, quarter.ratio, quarter.value) == (Interval(0, 20), Interval(0.0, 1.0), 0.1)
    assert (half.amount, half.ratio, half.value) == (Interval(0, 20), Interval(0.0, 0.1), 0.01)
    assert (most.amount, most.ratio, most.value) == (Interval(20, 200), Interval(0.01, 1.0), 0.1)
    assert (nearly.amount, nearly.ratio, nearly.value) == (Interval(20, 200), Interval(0.0, 0.1), None)
    undo = list(found["undo"].values())
    assert undo[1].amount == Interval(20, 200) and undo[1].value == 0.1, "the better of two rates, though it fell again"
    assert undo[2].ratio == Interval(1.0, math.inf) and undo[2].value is None
    assert undo[3].unknown, "neither reaches it"
    assert [one.value for one in found["filter"].values()] == [1.0, 1.0, 1.0, None]
    assert found["filter"][0.25].ratio == Interval(1.0, 1.0)
    assert slowdowns(MODELS, True, "steps")["undo"][0.5].amount == Interval(10, 100)


def test_a_loss_gives_what_the_mirrored_accuracy_does():
    mirrored = [
        entry(
            each["kind"],
            1 - each["metrics"]["forget"]["value"],
            *([1 - s["value"] for s in curve["forget"]] for curve in (each["attack"] or {"curves": ()})["curves"]),
        )
        for each in MODELS
    ]
    values = [[one.value for one in own.values()] for own in slowdowns(mirrored, False).values()]
    assert values == [[one.value for one in own.values()] for own in slowdowns(MODELS, True).values()]


def test_the_random_student_stands_in_for_data_filtering():
    student = {**MODELS[3], "name": "student", "kind": "random"}
    assert slowdown_entry(results([*MODELS[:3], student]))["reference"] == "student"
    assert slowdown_entry(results([*MODELS, student]))["reference"] == "filter"
    assert slowdown_entry(results(MODELS[:3])) is None and slowdown_entry(results(MODELS[1:])) is None
    assert slowdown_entry(results([entry("original", 0.05), *MODELS[1:]])) is None, "the original is no better"


def test_a_checkpoint_can_be_given_as_the_reference():
    given = {**entry("defence", 0.1, [0.1, 0.1, 0.35, 0.75]), "name": "scratch", "reference": True}
    assert slowdown_entry(results([*MODELS, given]))["reference"] == "scratch"
    assert slowdown_entry(results([*MODELS, given, {**given, "name": "other"}])) is None, "which one is not said"


def test_why_there_is_none_is_said():
    assert missing(MODELS, True) == ""
    assert "no original model" in missing(MODELS[1:], True)
    assert "no attacked model is known to be without the capability" in missing(MODELS[:3], True)
    assert "no attack that trains on the forget text recorded" in missing([MODELS[0], entry("filter", 0.1)], True)
    assert "no better" in missing([entry("original", 0.05), *MODELS[1:]], True)
    two = [{**MODELS[3], "name": name, "reference": True} for name in ("one", "two")]
    assert "several models" in missing([*MODELS[:3], *two], True)


def test_attacks_on_other_text_do_not_count():
    """Each reaches every level after one step, which no attack on the forget text does."""
    steps = [0, 1]
    quick = {"kind": "finetune", "steps": steps, "curves": [{"flops": [0, 1], "forget": [{"value": 0.1}, {"value": 0.9}]}]}
    trials = [{**quick["curves"][0], "steps": steps, "point": {"batch_size": 4, "retain_share": share}} for share in (0.9, 0.5)]
    slow = {**trials[1], "forget": [{"value": 0.1}, {"value": 0.1}]}
    part, near = {"forget_part": 0.5, "retain_near": None, "seed": 0}, {"forget_part": None, "retain_near": 0.1, "seed": 0}
    plain = {"forget_part": None, "retain_near": None, "seed": 0}
    cases = [
        ({"kind": "finetune", "text": part, "mix": {"forget": 1.0}}, quick, True),
        ({"kind": "lora", "text": near, "mix": {"forget": 0.5, "retain": 0.5}}, quick, True),
        ({"kind": "finetune", "text": plain, "mix": {"retain": 1.0}}, quick, True),
        ({"kind": "finetune", "text": plain, "mix": {"forget": 0.5, "retain": 0.5}}, quick, False),
        ({"kind": "finetune", "mix": {"forget": 1.0}}, quick, False),
        ({"kind": "search", "like": {"text": part}}, {**quick, "trials": trials}, True),
        ({"kind": "search", "like": None}, {**quick, "trials": trials}, False),
        ({"kind": "search", "like": None}, {**quick, "trials": [trials[0], slow]}, None),
    ]
    for own, attack, apart in cases:
        config = {"relearn": {"kind": "finetune", "text": plain, "mix": {"forget": 1.0}}, "attacks": {"named": own}}
        found = results([*MODELS[:2], {**MODELS[2], "attacks": {"named": attack}}, MODELS[3]], config)
        assert other_text(config) == (["named"] if apart else []), own
        amount = slowdowns(comparable(found), True)["undo"][0.75].amount
        assert amount == (Interval(0, 1) if apart is False else Interval(2000, math.inf)), own
    config = {"relearn": {"text": part, "mix": {"forget": 1.0}}, "attacks": {"again": {"kind": "search", "like": None}}}
    assert other_text(config) == ["relearn", "again"], "a search without another attack is like the headline attack"
    assert slowdown_entry(results(MODELS, config)) is None


def test_attacks_without_flops_and_those_with_the_original_do_not_count():
    free = {"rounded": {"steps": [0], "curves": [{"forget": [{"value": 0.9}]}]}}
    strong = {
        "steps": [0, 1],
        "needs_original": True,
        "curves": [{"flops": [0, 1], "forget": [{"value": 0.1}, {"value": 0.9}]}],
    }
    models = [*MODELS[:2], {**MODELS[2], "attacks": {**free, "merged": strong}}, MODELS[3]]
    assert slowdowns(models, True) == slowdowns(MODELS, True)
    quick = {"steps": [0, 1], "curves": [{"flops": [0, 1], "forget": [{"value": 0.1}, {"value": 0.9}]}]}
    models[2] = {**MODELS[2], "attacks": {"quick": quick}}
    assert slowdowns(models, True)["undo"][0.75].amount == Interval(0, 1)


def test_the_entry_of_the_results_is_json():
    found = slowdown_entry(results(MODELS))
    assert [level["share"] for level in found["levels"]] == [0.25, 0.5, 0.75, 0.9]
    assert found["models"]["undo"][2] == {
        "flops": {"amount": [2000.0, None], "ratio": [1.0, None], "value": None},
        "steps": {"amount": [1000, None], "ratio": [1.0, None], "value": None},
    }


def test_the_frontier_keeps_improvements_in_order_of_their_flops():
    trials = [Trajectory([0, 10, 100], [0, 1, 10], [0.1, 0.5, 0.4]), Trajectory([0, 20, 40], [0, 1, 2], [0.2, 0.3, 0.7])]
    assert frontier(trials, True) == ([0, 10, 40], [0.2, 0.5, 0.7])
    assert frontier([], True) == ([], [])


curves = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(1, 10**6), min_size=size, max_size=size, unique=True).map(sorted),
        st.lists(st.integers(0, 4).map(lambda quarters: quarters / 4), min_size=size, max_size=size),
    )
)


@settings(deadline=None, max_examples=25)
@given(st.lists(curves, min_size=1, max_size=3), st.lists(curves, min_size=1, max_size=3), st.sampled_from([0.25, 0.5, 0.75]))
def test_only_relative_flops_count(model, reference, level):
    """A unit of FLOPs cancels; any monotone rescaling moves a crossing with it; the value lies in its interval."""

    def at(trials, scale):
        return earliest(crossing([0, *map(scale, amounts)], [0, *values], level, True) for amounts, values in trials)

    plain, doubled = (slowdown(at(model, scale), at(reference, scale)) for scale in (float, lambda x: 1024.0 * x))
    assert (plain.ratio, plain.value) == (doubled.ratio, doubled.value)
    if plain.value is not None:
        assert plain.ratio.low <= plain.value <= plain.ratio.high
    squared, once = at(model, lambda x: float(x * x)), at(model, float)
    assert (squared.low, squared.high) == (once.low**2, once.high**2)


def test_a_ladder_is_a_short_way_to_write_evaluations():
    assert ladder_of(10000) == [0, 10, 22, 46, 100, 215, 464, 1000, 2154, 4642, 10000]
    assert ladder_of(10) == [0, 10] and ladder_of(150) == [0, 10, 22, 46, 100, 150]
    config = AttackConfig(ladder=1000)
    assert config.evaluate_at == [0, 10, 22, 46, 100, 215, 464, 1000] and config.training(1e-3).steps == 1000
    assert AttackConfig(ladder=1000, evaluate_at=[0, 5]) == config, "it replaces them"
    assert AttackConfig(ladder=100, headline_step=50).evaluate_at == [0, 10, 22, 46, 50, 100], "with the headline step"
    with pytest.raises(ValueError, match=r"headline_step: got 200, wanted one of evaluate_at, \[0, 10, 22, 46, 100\]"):
        AttackConfig(ladder=100, headline_step=200)
    with pytest.raises(ValueError, match="ladder: got 9, wanted an integer >= 10"):
        AttackConfig(ladder=9)
