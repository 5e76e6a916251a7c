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
    assert max(holm.values()) < 0.0005 and [row[3].main for row in table.rows] == ["< 0.001", "< 0.001"]
    assert [row[3].remark for row in table.rows] == ["an order", "an order"]
    said = order_sentences(found[0].report, comparisons)
    assert "NPO relearns less than MaxEnt; RMU relearns more than MaxEnt." in said[0]
    assert "NPO has a larger R than MaxEnt; RMU has a smaller R than MaxEnt." in said[1]
    assert said[2] == "C (FLOPs): no order in 2 of 2 comparisons.", "both train for as many steps"


def test_methods_whose_strongest_alphas_differ_are_compared_where_both_have_students():
    alphas = {"maxent": (0.4, 0.8), "npo": (0.4, 0.6), "rmu": (0.2,)}
    found = compare([(f"runs/{n}", run(n, s, n, alphas=own)) for n, own in alphas.items() for s in range(3)], "t")
    comparisons = compared(found)
    table = differences_table(found[0].report, comparisons)
    assert [row[0].main for row in table.rows] == [
        "NPO – MaxEnt, UNDO α=0.4",
        "RMU – MaxEnt, not compared: no alpha in common (0.2; 0.4 and 0.8)",
    ]
    differences = [attacked(found[1], "undo-0.4")[seed] - attacked(found[0], "undo-0.4")[seed] for seed in range(3)]
    assert table.rows[0][2].main.strip("+") == f"{100 * statistics.median(differences):.1f}"
    assert {cell.main for cell in table.rows[1][2:]} == {"–"} and table.rows[1][1].main == "0"
    for page in (compare_page("t", found, {}, {}), methods_markdown("t", found, methods_table(found), {})):
        assert "not compared: no alpha in common (0.2; 0.4 and 0.8)" in page.replace("\\", "")
    assert "of 1 comparisons" in order_sentences(found[0].report, comparisons)[0], "only one of the two was made"


def test_a_censored_alpha_is_compared_only_if_there_is_no_other():
    one, both = {"npo": (0.8,)}, {"npo": (0.4, 0.8), "maxent": (0.4,)}
    for censored, name in ((one, "UNDO α=0.4"), (both, "UNDO α=0.8")):
        loaded = [
            (n, run(n, s, n, alphas=(0.4, 0.8), censored=censored.get(n, ()))) for n in ("maxent", "npo") for s in range(3)
        ]
        (comparison,) = compared(compare(loaded, "t"))
        assert comparison.where == name


def test_methods_without_a_seed_in_common_are_not_compared():
    loaded = [(n, run(n, s, n)) for n, seeds in (("maxent", (0, 1, 2)), ("npo", (3, 4, 5))) for s in seeds]
    found = compare(loaded, "t")
    (row,) = differences_table(found[0].report, compared(found)).rows
    assert row[0].main == "NPO – MaxEnt, not compared: no seed in common at UNDO α=0.8"


def test_a_median_of_two_seeds_is_marked_and_has_no_interval():
    """MaxEnt has five seeds, NPO two: its rows are marked, whichever method comes first."""
    runs = [("maxent", seed) for seed in range(5)] + [("npo", seed) for seed in range(2)]
    for order in (runs, runs[::-1]):
        found = compare([(name, run(name, seed, name, alphas=(0.4, 0.8))) for name, seed in order], "t")
        table = medians_table(found)
        (mark,) = table.notes
        assert "fewer than 3 seeds" in table.notes[mark]
        for row in table.rows:
            few = row[0].main == "NPO"
            assert row[2].main == ("2" if few else "5")
            assert all((mark in c.marks, c.spread == "") == (few, few) for c in row[3:] if c.main != "–")
        differences = differences_table(found[0].report, compared(found))
        (row,), (mark,) = differences.rows, differences.notes
        assert row[1].main == "2" and row[2].marks == mark and row[2].spread == ""
        assert "[a] median over fewer than 3 seeds" in methods_markdown("t", found, methods_table(found), {})


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


def test_a_seed_without_a_value_is_told_at_the_cell():
    """The control of one seed did not reach NPO's target: its C is over four seeds, everything else over five."""
    loaded = [(name, run(name, seed, name, alphas=(0.4, 0.8))) for name in ("maxent", "npo") for seed in range(5)]
    (lacking,) = [entry for entry in loaded[7][1]["models"] if entry["kind"] == "filter"]
    lacking["training"]["short_of_target"] = True
    found = compare(loaded, "t")
    table = medians_table(found)
    row = next(row for row in table.rows if (row[0].main, row[1].main) == ("NPO", "UNDO α=0.8"))
    ((mark, text),) = table.notes.items()
    assert text.startswith("median over 4 of 5 seeds; in the others: data filtering, another run's, ended before")
    assert [cell.marks for cell in row[2:]] == ["", "", "", "", mark, mark] and row[2].main == "5"
    differences = differences_table(found[0].report, compared(found))
    (row,) = differences.rows
    assert [cell.marks for cell in row[1:]] == ["", "", "", "", "", "a", ""] and row[1].main == "5"
    assert differences.notes == {"a": "over seeds 0, 1, 3, 4 alone"}
