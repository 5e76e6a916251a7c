"""Compute slowdown in the report: cells with their censoring, the table, the page and the figure."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
from matplotlib.text import Text

from undo_core.attacks.slowdown import Interval, slowdown
from undo_core.report import derive, page
from undo_core.report.slowdown import captions, explanation, slowdown_cell, slowdown_table
from undo_core.report.slowdown import slowdown as figure
from undo_core.report.table import Notes, markdown


def score(value):
    return {"value": value, "low": value, "high": value, "n": 100}


def model(kind, forget, *curves, alpha=None, steps=(0, 10, 100, 1000)):
    attack = {
        "rates": [10.0**-n for n in range(len(curves))],
        "steps": list(steps),
        "curves": [
            {
                "rate": 10.0**-n,
                "stage": "s",
                "forget": [score(v) for v in curve],
                "retain": [score(0.9)] * len(steps),
                "flops": [1e9 * s for s in steps],
            }
            for n, curve in enumerate(curves)
        ],
    }
    name = f"undo-{alpha:g}" if alpha is not None else kind
    metrics = {"retain": score(0.95), "forget": score(forget)}
    own = {"name": name, "kind": kind, "alpha": alpha, "metrics": metrics, "training": None}
    return {**own, "attack": attack if curves else None}


def result(seed=0):
    models = [
        model("original", 0.9),
        model("unlearn", 0.1, [0.1, 0.6, 0.9, 0.9], [0.1, 0.2, 0.3, 0.4]),
        model("undo", 0.1, [0.1, 0.2, 0.4, 0.72], [0.1, 0.1, 0.2, 0.3], alpha=0.5),
        model("filter", 0.1, [0.1, 0.1, 0.35, 0.75]),
    ]
    return {
        "format": 1,
        "name": "cost",
        "seed": seed,
        "command": "undo run",
        "metric": {"kind": "accuracy", "headline_step": 100, "retain_target": None, "eval_splits": {}},
        "models": models,
    }


def cell(*pairs):
    return slowdown_cell([slowdown(Interval(*model), Interval(*reference)) for model, reference in pairs], Notes(), "filter")


def test_a_cell_says_what_is_known():
    assert (known := cell(((10, 20), (100, 200)))).main == "0.1" and known.spread == "0.05 to 0.2"
    assert cell(((10, 20), (0, 200))).spread == "≥ 0.05"
    assert cell(((1000, math.inf), (100, 200))).main == "≥ 5"
    assert cell(((1000, math.inf), (100, 200))).remark == "> 1.0e+03 FLOPs"
    assert cell(((10, 20), (1000, math.inf))).main == "≤ 0.02"
    assert (neither := cell(((1000, math.inf), (1000, math.inf)))).main == "n/a" and neither.marks
    assert cell(((0, 0), (100, 200))).main == "0"
    first = cell(((0, 20), (0, 10)))
    assert (first.main, first.spread, first.marks) == ("2", "", ""), "no note that neither reaches what both reach"


def test_a_median_over_seeds_lies_between_the_medians_of_the_ends():
    three = cell(((10, 20), (100, 200)), ((100, 200), (100, 200)), ((1000, math.inf), (100, 200)))
    assert three.main == "0.5 to 2" and not three.spread, "the middle one of three, whatever the censored one is"
    assert cell(((10, 20), (100, 200)), ((1000, math.inf), (1000, math.inf))).main == "≥ 0.025", (
        "nothing is known of the second"
    )


def test_the_table_has_levels_and_models():
    table = slowdown_table(derive([result()], "t"))
    assert [header[0] for header in table.headers] == ["capability back", "unlearn only", "UNDO α=0.5", "data filtering"]
    assert [[c.main for c in row] for row in table.rows] == [
        ["25 %", "0.1", "1", "1"],
        ["50 %", "0.01", "1", "1"],
        ["75 %", "0.1", "1", "1"],
        ["90 %", "≤ 0.1", "n/a", "n/a"],
    ]
    assert "| 90 % (82.0 %) | ≤ 0.1 (1.0e+11 FLOPs)" in markdown(table)


def test_the_report_shows_it_only_where_flops_are_known():
    report = derive([result(0), result(1)], "cost")
    assert figure(report) is not None
    html = page.render(report, {"slowdown": b"png"})
    assert "Compute slowdown" in html and "Medians over seeds" in html and "Best forget performance" in html
    older = copy.deepcopy(result())
    for entry in older["models"]:
        for curve in (entry["attack"] or {"curves": ()})["curves"]:
            del curve["flops"]
    report = derive([older], "cost")
    assert figure(report) is None and not slowdown_table(report).rows
    assert "No compute slowdown: no attack that trains on the forget text recorded its FLOPs." in page.render(report, {})


def test_a_single_budget_has_a_table_and_no_figure():
    short = result()
    for attack in (entry["attack"] for entry in short["models"] if entry["attack"]):
        attack["steps"] = attack["steps"][:2]
        for curve in attack["curves"]:
            for part in ("forget", "retain", "flops"):
                curve[part] = curve[part][:2]
    report = derive([short], "t")
    assert figure(report) is None and slowdown_table(report).rows
    undo = short["models"][2]["attack"]
    undo["steps"].append(100)
    for curve in undo["curves"]:
        for part, value in (("forget", score(0.2)), ("retain", score(0.9)), ("flops", 1e11)):
            curve[part].append(value)
    assert figure(derive([short], "t")) is not None, "one model with two evaluations is enough"


def test_the_legend_names_a_student_that_did_not_recover():
    own = result()
    own["metric"]["retain_target"] = 0.9
    own["models"][2]["training"] = {"steps": 8, "stop_step": None}
    names = [text.get_text() for text in figure(derive([own], "t")).legends[0].get_texts()]
    assert names == ["unlearn only", "UNDO α=0.5 (did not recover)", "data filtering"]


def test_attacks_on_other_text_are_left_out_of_table_and_figure():
    plain = result()
    config = {"relearn": {"kind": "finetune"}, "attacks": {"other-half": {"kind": "finetune", "text": {"forget_part": 0.5}}}}
    further = copy.deepcopy(plain)
    for entry in further["models"]:
        if entry["attack"]:
            quick = {"kind": "finetune", "headline_step": 10, **copy.deepcopy(entry["attack"])}
            for curve in quick["curves"]:
                curve["forget"] = [score(0.9)] * 4
            entry["attacks"] = {"other-half": quick}
    with_other = derive([{**further, "config": config}], "t")
    assert slowdown_table(with_other).rows == slowdown_table(derive([plain], "t")).rows
    lines = [[list(line.get_ydata()) for line in figure(report).axes[0].lines] for report in (with_other, derive([plain], "t"))]
    assert lines[0] == lines[1]
    said = "left out, because they train on other text: other-half"
    assert said in explanation(with_other) and said in captions(with_other)["slowdown"]
    assert "left out" not in explanation(derive([plain], "t"))


def test_a_run_without_a_reference_says_why_it_has_no_table():
    own = result()
    own["models"] = own["models"][:-1]
    report = derive([own], "t")
    assert "No compute slowdown: no attacked model is known to be without the capability" in page.render(report, {})
    for entry in own["models"]:
        entry["attack"] = None
    assert "compute slowdown" not in page.render(derive([own], "t"), {}), "nothing was attacked"


def test_a_median_of_two_seeds_is_marked():
    def marked(*seeds):
        texts = slowdown_table(derive([result(seed) for seed in seeds], "t")).notes.values()
        return [text for text in texts if "fewer than 3 seeds" in text]

    assert marked(0) == [] and marked(0, 1, 2) == [], "one seed is no median"
    assert len(marked(0, 1)) == 1


@pytest.mark.parametrize(("best", "others"), [(0.9, 0), (0.2, 0), (0.11, 25)])
def test_the_names_of_the_levels_do_not_overlap(best, others):
    """Levels far apart and near; with many models the legend leaves the axes less than half of their height."""
    own = result()
    own["models"][0]["metrics"]["forget"] = score(best)
    own["models"] += [{**model("damaged", 0.1, [0.1, 0.1, 0.2, 0.3]), "name": f"student-{number}"} for number in range(others)]
    drawn = figure(derive([own], "t"))
    drawn.draw_without_rendering()
    (axes,) = drawn.axes
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to the levels
    assert [text.get_text() for text in axes.texts] == ["25 %", "50 %", "75 %", "90 %"]
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
    assert boxes[-1].y1 <= axes.bbox.y1 + boxes[-1].height, "the uppermost stands at the axes"
