"""Medians, paired differences and orders over seeds: values computed by hand, and no order that the seeds do not show."""

import statistics

import pytest
from sweep_results import results as run

from undo_core.report import derive
from undo_core.report.compare import compare
from undo_core.report.compare_page import render as compare_page
from undo_core.report.compare_table import methods_markdown, methods_table
from undo_core.report.over_seeds import between_alphas, compared, differences_table, medians_table, order_sentences
from undo_core.report.page import render
from undo_core.report.seeds import t_test


def settings(seeds=5, loss=False, **strengths):
    strengths = strengths or {"maxent": 1.0, "npo": 1.3, "rmu": 0.7}
    loaded = [
        (f"runs/{name}", run(name, seed, name, strength=strength, alphas=(0.4, 0.8), loss=loss))
        for name, strength in strengths.items()
        for seed in range(seeds)
    ]
    return compare(loaded, "t")


def attacked(setting, name="undo-0.8"):
    return {p.seed: p.value for p in next(m for m in setting.report.models if m.name == name).worst[100].points}


def test_differences_between_methods_are_paired_and_corrected():
    found = settings()
    comparisons = compared(found)
    table = differences_table(found[0].report, comparisons)
    assert [row[0].main for row in table.rows] == ["NPO – MaxEnt, UNDO α=0.8", "RMU – MaxEnt, UNDO α=0.8"]
    ps = []
    for row, setting in zip(table.rows, found[1:], strict=True):
        differences = [attacked(setting)[seed] - attacked(found[0])[seed] for seed in range(5)]
        assert row[2].main == f"{100 * statistics.median(differences):+.1f}"
        assert row[2].spread == f"{100 * min(differences):+.1f} to {100 * max(differences):+.1f}"
        ps.append(t_test(differences))
    smaller, larger = sorted(ps)
    holm = {smaller: 2 * smaller, larger: max(2 * smaller, larger)}
    assert [row[3].main for row in table.rows] == [f"{holm[p]:.3f}" for p in ps]
    assert [row[3].remark for row in table.rows] == ["an order", "an order"]
    said = order_sentences(found[0].report, comparisons)
    assert "NPO relearns less than MaxEnt; RMU relearns more than MaxEnt." in said[0]
    assert "NPO has a larger R than MaxEnt; RMU has a smaller R than MaxEnt." in said[1]
    assert said[2] == "C (FLOPs): no order in 2 of 2 comparisons.", "both train for as many steps"


def test_a_loss_has_the_other_direction():
    found = settings(loss=True)
    assert (
        "NPO relearns less than MaxEnt; RMU relearns more than MaxEnt." in order_sentences(found[0].report, compared(found))[0]
    )


def test_no_order_without_a_difference():
    found = settings(maxent=1.0, npo=1.0)
    swapped = found[1].report.of("undo")[-1].worst[100].points
    assert len(swapped) == 5
    table = differences_table(found[0].report, compared(found))
    assert table.rows[0][2].main == "0.0" and table.rows[0][3].remark == ""
    assert all("no order in 1 of 1" in sentence for sentence in order_sentences(found[0].report, compared(found)))


def test_medians_are_those_of_the_seeds():
    found = settings(3)
    table = medians_table(found)
    row = next(row for row in table.rows if (row[0].main, row[1].main) == ("NPO", "UNDO α=0.8"))
    values = sorted(attacked(found[1]).values())
    assert (row[4].main, row[4].spread) == (f"{100 * values[1]:.1f}", f"{100 * values[0]:.1f}–{100 * values[2]:.1f}")
    assert row[2].main == "3"


@pytest.mark.parametrize("seeds", [2, 3])
def test_the_pages_have_them_from_three_seeds_on(seeds):
    found = settings(seeds)
    page, text = compare_page("t", found, {}, {}), methods_markdown("t", found, methods_table(found), {})
    report = derive([run("maxent", seed) for seed in range(seeds)], "t")
    alone = render(report, {})
    for shown, heading in ((page, "Over the seeds"), (text, "Over the seeds"), (alone, "Between alphas")):
        assert (heading in shown) == (seeds == 3)
    assert not differences_table(report, between_alphas(report)).rows or seeds == 3


def test_neighbouring_alphas_and_both_ends_are_compared():
    report = derive([run("maxent", seed) for seed in range(5)], "t")
    table = differences_table(report, between_alphas(report))
    assert [row[0].main for row in table.rows] == [
        f"UNDO α={b} – UNDO α={a}" for a, b in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.2, 0.8))
    ]
    assert "UNDO α=0.8 relearns less than UNDO α=0.6" in order_sentences(report, between_alphas(report))[0]
