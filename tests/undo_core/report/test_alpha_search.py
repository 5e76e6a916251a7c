"""R with its interval, and what the report says of a search for an alpha, against values computed by hand."""

import copy

import pytest
from sweep_results import results as run

from undo_core.report import derive
from undo_core.report.alpha_search import UNSURE, alpha_sentences, alpha_table, outcomes
from undo_core.report.attacks import Point
from undo_core.report.page import render
from undo_core.report.robustness import Z, ratio_of_robustness, robustness_point


def test_the_interval_of_r_propagates_the_three_evaluations():
    values, spreads = (0.45, 0.92, 0.31), (0.011, 0.004, 0.017)  # not on one scale, so that no two factors can be swapped
    points = [Point(3, v, v - Z * s, v + Z * s) for v, s in zip(values, spreads, strict=True)]
    found = robustness_point(*points)
    variance, step = 0.0, 1e-6
    for index, spread in enumerate(spreads):
        ends = []
        for sign in (1, -1):
            moved = list(values)
            moved[index] += sign * step
            ends.append(ratio_of_robustness(*moved))
        variance += ((ends[0] - ends[1]) / (2 * step) * spread) ** 2
    assert found.seed == 3 and found.value == (0.45 - 0.92) / (0.31 - 0.92)
    assert found.high - found.value == pytest.approx(found.value - found.low) == pytest.approx(Z * variance**0.5, rel=1e-6)
    assert robustness_point(points[0], points[1], Point(3, 0.31)).low is None, "an evaluation without an interval"
    assert "P_random - P_unlearn" in robustness_point(points[0], points[0], points[0], "random")


def searched(target, tried=(0.4, 0.8, 0.6), **changes):
    values = run("maxent", alphas=tuple(sorted(tried)), **changes)
    limits = {"resolution": 0.02, "tries": 8, "largest": 0.9, "configured": 2}
    return {**values, "alpha_search": {"target": target, **limits, "tried": list(tried), "ended": "the reason"}}


def test_the_table_has_every_tried_alpha_in_order():
    values = searched(0.5)
    exact = outcomes(values)
    assert exact[0.4] < exact[0.6] < exact[0.8]
    target = (exact[0.6] + exact[0.4]) / 2
    report = derive([searched(target)], "t")
    table = alpha_table(report)
    shown = [[cell.main for cell in row] for row in table.rows]
    assert [row[1:3] for row in shown] == [["0.4", "configured"], ["0.8", "configured"], ["0.6", "no. 1"]]
    assert [row[-1] for row in shown] == ["misses", "reaches", "reaches"]
    assert [row[3] for row in shown] == [f"{exact[alpha]:.2f}" for alpha in (0.4, 0.8, 0.6)]
    steps = {model.alpha: model.compute["steps"].mean for model in report.of("undo")}
    assert [row[4] for row in shown] == [f"{steps[alpha]:.2f}" for alpha in (0.4, 0.8, 0.6)]
    (said,) = alpha_sentences(report)
    assert (
        f"cheapest tried alpha that reached R = {target:g} is 0.6" in said and "0.4, missed it" in said and UNSURE not in said
    )


def test_a_try_is_predicted_from_what_was_tried_before_it():
    report = derive([searched(0.5, tried=(0.2, 0.8, 0.6, 0.7))], "t")
    exact = outcomes(searched(0.5, tried=(0.2, 0.8, 0.6, 0.7)))
    flops = {model.alpha: model.entries[0]["training"]["flops"] for model in report.of("undo")}
    rows = {row[1].main: row for row in alpha_table(report).rows}
    assert [rows[alpha][7].main for alpha in ("0.2", "0.8")] == ["–", "–"], "a configured alpha is not predicted"
    for alpha, low, share in (("0.6", 0.2, 2 / 3), ("0.7", 0.6, 1 / 2)):
        r, spent = rows[alpha][7:9]
        assert r.main == f"{exact[low] + share * (exact[0.8] - exact[low]):.2f}"
        assert r.spread == f"{exact[low]:.2f} to {exact[0.8]:.2f}"
        assert spent.main == f"{flops[low] ** (1 - share) * flops[0.8] ** share:.2e}"
        assert spent.spread == "", "the neighbours' FLOPs are no interval"


def test_it_marks_an_interval_that_contains_the_target():
    exact = outcomes(searched(0.5))
    report = derive([searched(exact[0.6] - 0.001)], "t")
    marked = {row[1].main for row in alpha_table(report).rows if row[-1].marks}
    assert marked == {"0.6"} and UNSURE in alpha_sentences(report)[0] and UNSURE in alpha_table(report).notes.values()


def test_it_says_that_none_reached_and_which_was_not_repaired():
    report = derive([searched(3.0, censored=(0.8,))], "t")
    assert [row[-1].main for row in alpha_table(report).rows] == ["misses", "not repaired", "misses"]
    (said,) = alpha_sentences(report)
    assert said.startswith("No tried alpha up to 0.8 reached R = 3") and "α = 0.6" in said and "because the reason" in said


def test_it_says_where_r_falls_again():
    values = searched(0.3)
    weak, strong = (next(m for m in values["models"] if m["alpha"] == alpha) for alpha in (0.4, 0.8))
    weak["attack"], strong["attack"] = strong["attack"], weak["attack"]
    exact = outcomes(values)
    values["alpha_search"]["target"] = (exact[0.4] + exact[0.6]) / 2
    assert "at 0.6, 0.8 it is below the target again" in alpha_sentences(derive([values], "t"))[0]


def test_without_data_filtering_the_random_student_is_the_control():
    values = searched(0.5)
    values["models"] = [model for model in values["models"] if model["kind"] not in ("filter", "oracle", "oracle-random")]
    report = derive([values], "t")
    worst = {model.name: model.worst[100].mean for model in report.models if model.worst}
    expected = (worst["undo-0.6"] - worst["unlearn"]) / (worst["random"] - worst["unlearn"])
    assert (
        outcomes(values)[0.6] == pytest.approx(expected) and alpha_table(report).headers[3][1] == "against the random student"
    )
    without = copy.deepcopy(values)
    without["models"] = [model for model in without["models"] if model["kind"] != "random"]
    assert outcomes(without)[0.6] == "neither data filtering nor a random student"
    assert "The search for an alpha" in render(report, {})


def test_seeds_that_tried_other_alphas_share_a_report():
    several = [searched(0.5), {**searched(0.5, (0.4, 0.8, 0.7), seed=1)}]
    for values in several:
        values["config"]["noise"] = {"alphas": [0.4, 0.8]}
        values["config"]["target_robustness"] = 0.5 + 0.1 * values["seed"]
    report = derive(several, "t")
    assert [row[0].main for row in alpha_table(report).rows] == ["0"] * 3 + ["1"] * 3
    assert [sentence[:7] for sentence in alpha_sentences(report)] == ["Seed 0:", "Seed 1:"]
