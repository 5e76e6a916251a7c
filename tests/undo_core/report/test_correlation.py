"""Rank correlations of measures with relearning, against values computed by hand and against another definition."""

import math
import random

import pytest
from small_results import measure
from sweep_results import results as run

from undo_core.report import derive
from undo_core.report.correlation import bootstrap, correlation_table, pairs_of, spearman
from undo_core.report.inside import measure_table


def test_ranks_decide_and_ties_share_theirs():
    assert spearman([(1, 5), (10, 6), (11, 70)]) == 1.0 and spearman([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert spearman([(1, 1), (1, 2)]) is None
    # Ranks 1, 2.5, 2.5, 4 and 2, 1, 3, 4: a sum of products 3 and of squares 4.5 and 5.
    assert spearman([(1, 20), (2, 10), (2, 30), (3, 40)]) == pytest.approx(3 / (4.5 * 5) ** 0.5)


def test_without_ties_it_is_the_formula_of_the_differences():
    generator = random.Random(1)
    for count in (5, 9, 30):
        pairs = [(generator.random(), generator.random()) for _ in range(count)]
        order = [{value: rank for rank, value in enumerate(sorted(pair[side] for pair in pairs))} for side in (0, 1)]
        squares = sum((order[0][x] - order[1][y]) ** 2 for x, y in pairs)
        assert spearman(pairs) == pytest.approx(1 - 6 * squares / (count * (count**2 - 1)))


def test_the_interval_holds_the_correlation_and_narrows_with_more_pairs():
    generator = random.Random(2)
    spans = []
    for count in (8, 40):
        pairs = [(x := generator.random(), x + 0.5 * generator.random()) for _ in range(count)]
        low, high = bootstrap(pairs)
        assert -1 <= low < spearman(pairs) < high <= 1 and bootstrap(pairs) == (low, high)
        spans.append(high - low)
    assert spans[1] < spans[0]
    assert bootstrap([(1, 1)] * 8) is None


def test_the_report_pairs_each_attacked_model_and_seed_with_its_measure():
    results = [run("one", seed) for seed in (0, 1)]
    assert correlation_table(derive(results, "none")).rows == [] == measure_table(derive(results, "none")).rows
    for result in results:
        for index, entry in enumerate(result["models"]):
            number = None if entry["kind"] == "original" else 0.1 * index + result["seed"]
            entry["measures"] = {"cka": measure(number)}
    report = derive(results, "with")
    attacked = sum(entry["attack"] is not None for result in results for entry in result["models"])
    pairs = pairs_of(report, "cka")
    assert len(pairs) == attacked >= 5
    (row,) = correlation_table(report).rows
    assert [cell.main for cell in row][0::3] == ["cka", str(attacked)] and row[1].main == f"{spearman(pairs):+.2f}"
    table = measure_table(report)
    assert table.headers[2] == ("cka", "mean, forget text") and len(table.rows) == len(report.models)
    assert table.rows[0][2].main == "n/a"


@pytest.mark.parametrize("loss", [False, True])
def test_a_broken_model_is_no_pair_because_it_relearns_nothing(loss):
    """An accuracy of half of the original's, or a loss of log 2 above it, still counts."""
    result = run("one", 0, loss=loss)
    for index, entry in enumerate(result["models"]):
        entry["measures"] = {"cka": measure(0.1 * index)}
    whole = pairs_of(derive([result], "whole"), "cka")
    assert not correlation_table(derive([result], "whole")).below
    entries = {entry["name"]: entry["metrics"]["retain"] for entry in result["models"]}
    best = entries["original"]["value"]
    entries["undo-0.8"]["value"] = best + math.log(2) - 1e-6 if loss else best / 2
    entries["undo-0.6"]["value"] = best + math.log(2) + 1e-3 if loss else best / 2 - 1e-3
    report = derive([result], "broken")
    lost = next(index for index, entry in enumerate(result["models"]) if entry["name"] == "undo-0.6")
    assert pairs_of(report, "cka") == [pair for pair in whole if pair[0] != 0.1 * lost]
    table = correlation_table(report)
    assert table.rows[0][3].main == str(len(whole) - 1) and table.below[0].endswith("left out: UNDO α=0.6.")
    result["models"] = [entry for entry in result["models"] if entry["name"] != "original"]
    assert pairs_of(derive([result], "without an original"), "cka") == whole
