"""The report: R, C and worst cases against values computed by hand, what is omitted and why, and the files."""

from __future__ import annotations

import copy
import functools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from small_results import (
    FIGURES,
    STEPS,
    attack,
    by_name,
    censor,
    entry,
    run,
    said_first,
    score,
    trained,
)

from undo_core.report import derive, write_report
from undo_core.report.results import read_results
from undo_core.report.robustness import ratio_of_robustness
from undo_core.report.table import group_table


def test_the_opening_says_what_the_damage_left() -> None:
    result, left = run(), "42 parameters (9,904 elements, 25.5% of the model): not text"
    assert "The damage left" not in said_first(derive([result], "title"))
    entry(result, "undo-0.2")["left"] = entry(result, "undo-0.6")["left"] = left
    assert said_first(derive([result], "title")).count(f"The damage left {left}.") == 1


def test_many_groups_have_a_line_each() -> None:
    """MMLU has 57 subjects, too many for columns."""
    result = run()
    for model in result["models"]:
        model["metrics"]["forget"]["groups"] = {f"subject_{i:02}": score(i / 100) for i in range(30)}
    table = group_table(derive([result], "title"))
    assert [name for name, _ in table.headers] == ["group", *(m.label for m in derive([result], "title").models)]
    assert [row[0].main for row in table.rows] == ["retain +", "retain -", *(f"forget subject_{i:02}" for i in range(30))]
    assert all(cell.main == "7.0" for cell in table.rows[9][1:]) and len(table.rows[9]) == len(table.headers)
    few = group_table(derive([run()], "title"))
    assert [name for name, _ in few.headers] == ["model", "retain +", "retain -"]


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_r_c_and_worst_cases_by_hand(kind: str) -> None:
    models = by_name([run(kind=kind)])
    worst = models["undo-0.2"].worst
    expected = {0: 0.05, 20: 0.3, 100: 0.7}
    assert {s: worst[s].mean for s in STEPS} == pytest.approx(
        expected if kind == "accuracy" else {s: 1 - v for s, v in expected.items()}
    )
    assert worst[20].rates == [4e-3] and worst[100].rates == [1e-3]  # the worst rate is chosen separately at each step
    assert worst[20].points[0].retain == pytest.approx(0.8) and worst[100].points[0].retain == pytest.approx(0.9)
    # (0.7 - 0.9) / (0.3 - 0.9), (0.5 - 0.9) / (0.3 - 0.9), (0.4 - 0.9) / (0.3 - 0.9); signs cancel for a loss
    assert models["undo-0.2"].robustness.mean == pytest.approx(1 / 3)
    assert models["undo-0.6"].robustness.mean == pytest.approx(2 / 3)
    assert models["random"].robustness.mean == pytest.approx(5 / 6)
    # 300 / 500 steps, 3000 / 5000 tokens, 1.5e9 / 1e9 FLOPs
    assert {unit: c.mean for unit, c in models["undo-0.6"].compute.items()} == pytest.approx(
        {"steps": 0.6, "tokens": 0.6, "flops": 1.5}
    )
    assert not models["unlearn"].robustness and not models["filter"].compute["steps"]
    assert list(models) == ["original", "unlearn", "undo-0.2", "undo-0.6", "random", "filter"]


def test_three_seeds_give_means_ranges_and_every_point() -> None:
    results = [run(seed) for seed in (2, 0, 1)]
    for result, value, steps in zip(results, (0.5, 0.4, 0.6), (300, 200, 400), strict=True):
        entry(result, "undo-0.6")["attack"] = attack([0.05, 0.2, 0.2], [0.05, 0.1, value])
        entry(result, "undo-0.6")["training"] = trained(steps, 1e9)
    found = by_name(results)["undo-0.6"]
    # R per seed: (v - 0.9) / -0.6 for v = 0.4, 0.6, 0.5 in seeds 0, 1, 2
    assert {p.seed: p.value for p in found.robustness.points} == pytest.approx({0: 5 / 6, 1: 1 / 2, 2: 2 / 3})
    assert found.robustness.mean == pytest.approx(2 / 3) and found.robustness.spread == pytest.approx((1 / 2, 5 / 6))
    assert found.compute["steps"].mean == pytest.approx(0.6) and found.compute["steps"].spread == pytest.approx((0.4, 0.8))
    assert found.worst[100].mean == pytest.approx(0.5) and found.worst[100].spread == pytest.approx((0.4, 0.6))


def test_one_seed_shows_the_interval_of_its_evaluation() -> None:
    assert by_name([run()])["undo-0.2"].worst[100].spread == pytest.approx((0.68, 0.72))


def test_a_censored_student_has_no_r_and_no_c() -> None:
    results = [run(0), run(1)]
    censor(results[0], "undo-0.6")
    found = by_name(results)["undo-0.6"]
    assert found.censored == (0,)
    for stat in (found.robustness, *found.compute.values()):
        assert [p.seed for p in stat.points] == [1] and stat.missing == {0: "the model did not recover"}
    assert found.worst[100].points[0].seed == 0  # what was measured is still shown


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_a_broken_student_has_no_r_and_no_c(kind: str) -> None:
    """It stopped at its target, and was made useless afterwards: what an attack fails to bring back is no robustness."""
    results = [run(0, kind=kind), run(1, kind=kind)]
    best = entry(results[0], "original")["metrics"]["retain"]["value"]
    entry(results[0], "undo-0.6")["metrics"]["retain"]["value"] = best / 2 - 0.01 if kind == "accuracy" else best + 0.70
    entry(results[1], "undo-0.6")["metrics"]["retain"]["value"] = best / 2 + 0.01 if kind == "accuracy" else best + 0.69
    found = by_name(results)["undo-0.6"]
    assert found.broken == (0,) and found.censored == ()
    for stat in (found.robustness, *found.compute.values()):
        assert [p.seed for p in stat.points] == [1] and stat.missing[0].startswith("broken before the attack")
    assert found.worst[100].points[0].seed == 0, "what was measured is still shown"


def test_censored_data_filtering_leaves_nothing_to_compare_with() -> None:
    result = run()
    censor(result, "filter")
    found = by_name([result])["undo-0.6"]
    for stat in (found.robustness, *found.compute.values()):
        assert not stat and stat.missing == {0: "data filtering did not recover"}


def test_without_a_retain_target_nothing_is_censored_and_c_is_not_given() -> None:
    result = run()
    result["metric"]["retain_target"] = None
    censor(result, "undo-0.6")
    found = by_name([result])["undo-0.6"]
    assert found.censored == () and found.robustness.mean == pytest.approx(2 / 3)
    assert found.compute["steps"].missing == {0: "no retain target to train to"}


def test_data_filtering_that_needed_no_training_gives_no_c() -> None:
    result = run()
    entry(result, "filter")["training"] |= {"steps": 0, "stop_step": 0, "stop_tokens": 0, "stop_flops": 0.0}
    found = by_name([result])["undo-0.6"]
    assert {reason for c in found.compute.values() for reason in c.missing.values()} == {
        "data filtering met the retain target before training"
    }
    assert found.robustness.mean == pytest.approx(2 / 3)


def test_small_denominators_give_no_r() -> None:
    assert ratio_of_robustness(0.7, 0.9, 0.8) == pytest.approx(2.0)  # exactly 0.1 is enough, up to rounding
    assert ratio_of_robustness(0.7, 0.8, 0.9) == pytest.approx(-1.0)
    assert "0.099" in str(ratio_of_robustness(0.7, 0.801, 0.9))
    result = run()
    entry(result, "filter")["attack"] = attack([0.05, 0.2, 0.85], [0.05, 0.1, 0.2])
    found = by_name([result])["undo-0.6"]
    assert found.robustness.missing == {0: "P_filter - P_unlearn is -0.050, under 0.1 in size"}
    assert found.compute["steps"].mean == pytest.approx(0.6)  # C stands


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_order_over_alpha(kind: str) -> None:
    results = [run(seed, kind) for seed in range(2)]
    raised = attack([0.05, 0.2, 0.74], [0.05, 0.1, 0.2]) if kind == "accuracy" else attack([0.95, 0.8, 0.26], [0.95, 0.9, 0.8])
    entry(results[1], "undo-0.6")["attack"] = raised
    first, second, mean = derive(results, "title").orders
    assert first.holds and [name for name, _ in first.chain] == ["undo-0.2", "undo-0.6", "random"]
    assert second.holds is False
    (rise,) = second.rises
    assert (rise["from"], rise["to"]) == ("undo-0.2", "undo-0.6")
    assert rise["by"] == pytest.approx(0.04) and rise["intervals_overlap"]  # 0.7 and 0.74, each +- 0.02
    assert mean.seed is None and mean.holds  # 0.7, 0.62, 0.4
    censor(results[1], "undo-0.6")
    _, second, mean = derive(results, "title").orders
    assert second.holds and second.left_out == mean.left_out == ["undo-0.6"]


class Page(HTMLParser):
    """Collects the resources that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


@pytest.mark.parametrize(("kind", "seeds"), [("accuracy", 1), ("accuracy", 3), ("loss", 1)])
def test_the_folder(tmp_path: Any, kind: str, seeds: int) -> None:
    results = [run(seed, kind) for seed in range(seeds)]
    before = copy.deepcopy(results)
    path = write_report(results, tmp_path / "report", "A <title>")
    assert results == before
    assert path == tmp_path / "report" / "report.html"
    names = {p.name for p in path.parent.iterdir()}
    assert names == {"report.html", "report.json", "table.md", *(f"{name}.png" for name in FIGURES)}
    for name in FIGURES:
        assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert len(page.sources) == len(FIGURES) and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text
    assert "A &lt;title&gt;" in text and "undo run small.yaml --seed 0" in text
    numbers = json.loads((path.parent / "report.json").read_text())
    undo = next(m for m in numbers["models"] if m["name"] == "undo-0.6")
    assert undo["R"]["mean"] == pytest.approx(2 / 3) and len(undo["R"]["points"]) == seeds
    assert undo["C"]["flops"]["mean"] == pytest.approx(1.5)
    row = next(line for line in (path.parent / "table.md").read_text().splitlines() if line.startswith("| UNDO α=0.6"))
    assert "0.67" in row and "1.50" in row and "at 4e-3" in row


def test_the_recorded_results_have_the_shape_that_reports_read() -> None:
    recorded = list((Path(__file__).parents[3] / "bench" / "results").rglob("results-seed*.json"))
    assert len(recorded) > 50 and all(read_results(path)["models"] for path in recorded)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["models", 1, "metrics", "retain", "value"], [0.9], r"a list in 'models\[1\].metrics.retain.value', wanted a number"),
        (
            ["models", 2, "attack", "curves", 0, "rate"],
            {},
            r"an object in 'models\[2\].attack.curves\[0\].rate', wanted a number",
        ),
        (["config", "noise"], {"alphas": [[0.2]]}, r"a list in 'config.noise.alphas\[0\]', wanted a number"),
        (["models", 0, "training", "history"], 5, r"an integer in 'models\[0\].training.history', wanted a list"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(tmp_path: Any, place: list[Any], value: Any, said: str) -> None:
    result = run()
    *outer, last = place
    functools.reduce(lambda part, name: part[name], outer, result)[last] = value
    path = tmp_path / "results-seed0.json"
    path.write_text(json.dumps(result))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: got {said}"):
        read_results(path)


def test_the_same_results_give_the_same_files(tmp_path: Any) -> None:
    for name in ("one", "two"):
        write_report([run()], tmp_path / name, "title")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_missing_parts_are_left_out_and_said(tmp_path: Any) -> None:
    write_report([run()], tmp_path, "title")
    result = run()
    result["models"] = [m for m in result["models"] if m["kind"] in ("original", "unlearn") or m["alpha"] == 0.6]
    for part in result["models"]:
        part["attack"] = None
    text = write_report([result], tmp_path, "title").read_text()
    assert "No model was attacked" in text and "no data filtering" in text
    # figures of the earlier report that this one lacks are removed
    assert {p.stem for p in tmp_path.glob("*.png")} == {"tradeoff", "training"}
    result["models"] = result["models"][:1]
    result["models"][0] |= {"training": None, "metrics": {"retain": score(0.9), "forget": score(0.8)}}
    assert "original" in write_report([result], tmp_path, "title").read_text()


def test_a_diverged_attack_and_the_end_of_the_grid(tmp_path: Any) -> None:
    result = run(kind="loss")
    part = entry(result, "undo-0.6")["attack"]
    part["worst_at_end_of_grid"] = True
    for curve in part["curves"]:
        curve["forget"][-1] = curve["retain"][-1] = {"value": 3.4e38, "low": 3.4e38, "high": 3.4e38, "n": 500}
    text = write_report([result], tmp_path, "title").read_text()
    assert "diverged" in text and "a stronger attack may" in text
    assert not by_name([result])["undo-0.6"].robustness
