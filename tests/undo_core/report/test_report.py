"""The report: R, C and worst cases against values computed by hand, what is omitted and why, and the files."""

from __future__ import annotations

import copy
import importlib
import io
import itertools
import json
import os
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from rich.console import Console

from undo_core.report import backend, derive, markdown_tables, page, terminal_table, write_report
from undo_core.report.attack_costs import attack_cost_table
from undo_core.report.figures import rates, relearning, tradeoff, training
from undo_core.report.page import table_html
from undo_core.report.robustness import ratio_of_robustness
from undo_core.report.style import spread_apart
from undo_core.report.table import group_table, markdown, results_table
from undo_core.report.words import captions, definitions, opening

STEPS = [0, 20, 100]
RATES = [1e-3, 4e-3]
FIGURES = ["relearning", "compute", "tradeoff", "training", "rates"]


def score(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 500}


def attack(*curves: list[float]) -> dict[str, Any]:
    """Returns an attack with one forget curve per rate, and retain performance 0.9, 0.8, 0.7 in the order of the rates."""
    return {
        "rates": RATES,
        "steps": STEPS,
        "extended": False,
        "worst_at_end_of_grid": False,
        "curves": [
            {
                "rate": rate,
                "stage": "relearn-0",
                "forget": [score(v) for v in curve],
                "retain": [score(0.9 - 0.1 * i)] * len(STEPS),
            }
            for i, (rate, curve) in enumerate(zip(RATES, curves, strict=True))
        ],
    }


def trained(steps: int, flops: float, reached: bool = True) -> dict[str, Any]:
    stops = {"stop_step": steps, "stop_tokens": 10 * steps, "stop_flops": flops} if reached else {}
    return {
        "steps": steps,
        "tokens": 10 * steps,
        "flops": flops,
        "seconds": 3.0,
        "limit_reached": not reached,
        "unlearning_steps": 0,
        "stop_step": None,
        "stop_tokens": None,
        "stop_flops": None,
        **stops,
        "labelled_forget_tokens": 7,
        "labelled_retain_tokens": 9,
        "peak_bytes": 1 << 20,
        "history": [{"step": s, "retain": 0.9 * s / steps, "loss": 1.0} for s in range(0, steps + 1, 20)],
    }


def model(kind: str, training: dict[str, Any], attacked: dict[str, Any] | None, alpha: float | None = None) -> dict[str, Any]:
    forget = 0.98 if kind == "original" else 0.05
    metrics = {name: score(value) for name, value in {"retain": 0.95, "forget": forget, "heldout_forget": 0.06}.items()}
    metrics["retain"]["groups"] = {"+": score(0.96), "-": score(0.94)}
    name = f"undo-{alpha:g}" if alpha is not None else kind
    return {
        "name": name,
        "kind": kind,
        "alpha": alpha,
        "stage": "s",
        "metrics": metrics,
        "training": training,
        "attack": attacked,
    }


def run(seed: int = 0, kind: str = "accuracy") -> dict[str, Any]:
    """Worst cases at step 100: unlearn 0.9, UNDO 0.7 and 0.5, random 0.4, filter 0.3; S: 100, 300, 450 and 500 steps.

    With a loss, each value v is replaced by 1 - v: the same differences, the other sign.
    """

    def curves(*values: list[float]) -> dict[str, Any]:
        return attack(*[[v if kind == "accuracy" else 1 - v for v in curve] for curve in values])

    return {
        "format": 1,
        "name": "small",
        "seed": seed,
        "command": f"undo run small.yaml --seed {seed}",
        "versions": {"torch": "2"},
        "machine": {"device": "a processor"},
        "config": {"name": "small", "output": f"out-{seed}", "seed": seed, "unlearn": {"method": "maxent"}},
        "metric": {"kind": kind, "headline_step": 100, "retain_target": 0.9, "eval_splits": {"test_retain": 500}},
        "models": [
            model("original", trained(400, 4e9), None),
            model("unlearn", trained(40, 1e8, False), curves([0.05, 0.6, 0.8], [0.05, 0.5, 0.9])),
            model("undo", trained(100, 5e8), curves([0.05, 0.2, 0.7], [0.05, 0.3, 0.6]), 0.2),
            model("undo", trained(300, 15e8), curves([0.05, 0.2, 0.4], [0.05, 0.1, 0.5]), 0.6),
            model("random", trained(450, 2e9), curves([0.05, 0.2, 0.4], [0.05, 0.1, 0.3])),
            model("filter", trained(500, 1e9), curves([0.05, 0.2, 0.3], [0.05, 0.1, 0.2])),
        ],
    }


def by_name(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {m.name: m for m in derive(results, "title").models}


def entry(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(m for m in result["models"] if m["name"] == name)


def censor(result: dict[str, Any], name: str) -> None:
    entry(result, name)["training"] |= {"stop_step": None, "stop_tokens": None, "stop_flops": None, "limit_reached": True}


def with_one_rate(result: dict[str, Any]) -> dict[str, Any]:
    """The results of an attack with the first learning rate alone, which is then at both ends of the grid."""
    for model in result["models"]:
        if model["attack"]:
            model["attack"] |= {"rates": RATES[:1], "curves": model["attack"]["curves"][:1], "worst_at_end_of_grid": True}
    return result


def printed(*results: dict[str, Any]) -> str:
    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(terminal_table(list(results)))
    return console.export_text()


def test_the_opening_says_what_the_damage_left() -> None:
    result, left = run(), "42 parameters (9,904 elements, 25.5% of the model): not text"
    assert "The damage left" not in opening(derive([result], "title"))
    entry(result, "undo-0.2")["left"] = entry(result, "undo-0.6")["left"] = left
    assert opening(derive([result], "title")).count(f"The damage left {left}.") == 1


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


def test_the_opening_quotes_the_numbers() -> None:
    result = run()
    text = opening(derive([result], "title")).replace("\u00a0", " ")
    assert "the unlearn-only model is at 90.0 %, UNDO between 50.0 (α = 0.6) and 70.0 % (α = 0.2)" in text
    assert "α = 0.6: R = 0.67 at 1.50 of data filtering's FLOPs" in text and "one seed" in text
    censor(result, "undo-0.6")
    text = opening(derive([result], "title")).replace("\u00a0", " ")
    assert "UNDO at 70.0 % (α = 0.2)" in text and "UNDO α=0.6 did not recover" in text and "R = 0.67" not in text


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_the_opening_says_that_a_student_did_not_recover(kind: str) -> None:
    results = [run(kind=kind)]
    results[0]["metric"]["retain_target"] = 0.95
    censor(results[0], "undo-0.6")  # its history ends at 0.9
    text = opening(derive(results, "title")).replace("\u00a0", " ")
    one, two, three = ("90.0 %", "70.0 %", "40.0 %") if kind == "accuracy" else tuple(f"0.{n}00 nats/token" for n in (1, 3, 6))
    assert f"the unlearn-only model is at {one}, UNDO at {two} (α = 0.2), the random student at {three} and data" in text
    reached, target, forget = ("90.0 %", "95.0 %", "50.0 %")
    if kind == "loss":
        reached, target, forget = (f"{value} nats/token" for value in ("0.900", "0.950", "0.500"))
    said = (
        f"UNDO α=0.6 did not recover its retain performance: it reached {reached} on the validation split, and the target is "
    )
    assert said + target + ". The forget " in text
    assert f"after the attack, {forget} of UNDO α=0.6, is therefore no evidence of robustness" in text
    assert "ensored" not in text


def test_the_opening_says_in_which_seeds_a_student_did_not_recover() -> None:
    results = [run(seed) for seed in range(3)]
    for seed, value in ((0, 0.5), (2, 0.3)):  # the worst case is at the second rate
        censor(results[seed], "undo-0.6")
        entry(results[seed], "undo-0.6")["attack"]["curves"][1]["forget"][-1] = score(value)
        entry(results[seed], "undo-0.6")["attack"]["curves"][0]["forget"][-1] = score(0.1)
    text = opening(derive(results, "title")).replace("\u00a0", " ")
    assert "UNDO α=0.6 did not recover its retain performance in seed 0, 2: it reached" in text
    assert "The forget accuracy after the attack, 40.0 % of UNDO α=0.6, is therefore" in text, "the mean of 50 and 30 %"


def test_figures_and_terms_say_did_not_recover() -> None:
    result = run()
    assert "did not recover" not in captions(derive([result], "title"))["relearning"]
    censor(result, "undo-0.6")
    report = derive([result], "title")
    assert "Lower is more robust, except for models that did not recover." in captions(report)["relearning"]
    terms = dict(definitions(report))
    assert "censored" in terms["did not recover"] and "no evidence of robustness" in terms["did not recover"]
    shown = [text.get_text() for text in relearning(report).axes[0].texts]
    for figure in (tradeoff(report), training(report)):
        shown += [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown.count("UNDO α=0.6 (did not recover)") == 3 and not [text for text in shown if "censored" in text]


def test_retain_after_the_attack_is_that_of_the_worst_trial() -> None:
    """The second rate, whose retain is 80 %, is the worst for unlearn only and UNDO with 0.6; the first, with 90 %, for the others."""
    for results in ([run()], [run(seed) for seed in range(3)]):
        table = results_table(derive(results, "title"))
        names = [name for name, _ in table.headers]
        at = names.index("retain after 100 steps")
        assert names[at - 1] == "forget after 100 steps"
        assert [row[at].main for row in table.rows] == ["–", "80.0", "90.0", "80.0", "90.0", "90.0"]
    result = run()
    for model in result["models"]:
        model["attack"] = None
    assert not [name for name, _ in results_table(derive([result], "title")).headers if name.startswith("retain after")]


def test_the_table_says_how_many_sequences_were_scored() -> None:
    result = run()
    assert "Test sequences: retain 500, forget 500, held-out forget 500." in printed(result)
    result["models"][0]["metrics"]["forget"]["n"] = 29
    (line,) = results_table(derive([result], "title")).below
    assert line.startswith("Test sequences: retain 500, forget 29 to 500, held-out forget 500. The interval of forget is rough")
    result["models"][0]["metrics"]["retain"]["n"] = 30
    (line,) = results_table(derive([result], "title")).below
    assert "The interval of forget is rough, with fewer than 30 sequences." in line, "30 are enough"
    result["config"]["data"] = {"questions": {"forget": {"paths": ["x"]}}}
    assert "Test questions: retain 30 to 500" in markdown(results_table(derive([result], "title")))
    assert "Test questions: retain 30 to 500" in table_html(results_table(derive([result], "title")))


def test_columns_without_a_value_are_left_out_and_the_reason_is_said_once() -> None:
    result = run()
    names = [name for name, _ in results_table(derive([result], "title")).headers]
    assert names.count("R") == 1 and names.count("C") == 3
    no_target = run()
    no_target["metric"]["retain_target"] = None
    table = results_table(derive([no_target], "title"))
    names = [name for name, _ in table.headers]
    assert names.count("R") == 1 and "C" not in names
    assert table.below[-1] == "No model has C: no retain target to train to."
    result["models"] = [m for m in result["models"] if m["kind"] in ("original", "unlearn", "undo")]
    censor(result, "undo-0.6")
    table = results_table(derive([result], "title"))
    assert not {"R", "C"} & {name for name, _ in table.headers}
    assert table.below[-1] == "No model has R or C: no data filtering."
    assert not [text for text in table.notes.values() if "n/a" in text]
    assert {len(row) for row in table.rows} == {len(table.headers)}
    assert printed(result).count("no data filtering") == 1


def test_what_each_attack_took() -> None:
    result = run()
    assert [cell.main for cell in attack_cost_table(derive([result], "title")).rows[0]] == [
        *("fine-tuning", "2", "100", "–", "–", "–", "–", "–")
    ]
    result["config"] |= {"data": {"kind": "text", "length": 32}, "relearn": {"kind": "finetune", "batch_size": 4}}
    result["config"]["attacks"] = {
        "mixed": {"kind": "finetune", "batch_size": 8},
        "prompted": {"kind": "fewshot", "batch_size": 8},
    }
    for number, part in enumerate(model for model in result["models"] if model["attack"]):
        for curve in part["attack"]["curves"]:
            curve["flops"] = [0.0, 2e8, 1e9 + number * 1e9]
        longer = {**copy.deepcopy(part["attack"]), "steps": [0, 20, 250], "headline_step": 20, "kind": "finetune"}
        longer["curves"] = longer["curves"][: 1 if number else 2]
        still = {**copy.deepcopy(part["attack"]), "steps": [0], "headline_step": 0, "kind": "fewshot"}
        searched = {"trials": [{"steps": [0, 10], "flops": [0.0, 1e6]}, {"steps": [0, 70], "flops": [0.0, 3e6]}]}
        part["attacks"] = {
            "mixed": longer,
            "prompted": still,
            "found": {**searched, "spent_flops": 4e6, "steps": [70], "curves": [{}], "headline_step": 70, "kind": "search"},
        }
        part["attacks"]["found"]["curves"] = [{"rate": None, "forget": [score(0.3)], "retain": [score(0.7)], "stage": "s"}]
    report = derive([result], "title")
    assert [[cell.main for cell in row] for row in attack_cost_table(report).rows] == [
        # 100 * 4 * 32 and 250 * 8 * 32 tokens; five models with 1e9 to 5e9 FLOPs a trial
        ["fine-tuning", "2", "100", "4", "32", "12.8k", "3.00e+09", "6.00e+09"],
        ["mixed", "1 to 2", "250", "8", "32", "64k", "3.00e+09", "3.20e+09"],
        ["found", "2", "up to 70", "searched", "32", "–", "3.00e+06", "4.00e+06"],
    ]
    for part in result["models"]:
        part.get("attacks", {}).pop("found", None)
    report = derive([result], "title")
    assert "## What each attack took" in markdown_tables(report) and "What each attack took" in page.render(report, {})
    result["config"]["data"] = {"kind": "arithmetic-compact", "length": 256}
    (row, *_) = attack_cost_table(derive([result], "title")).rows
    assert [cell.main for cell in row[3:6]] == ["4", "–", "–"], "its sequences hold a problem each and are not packed"


@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_the_name_of_the_target_stands_inside_the_axes(kind: str) -> None:
    result = run(kind=kind)
    for model in result["models"]:
        for point in model["training"]["history"]:
            point["retain"] = 0.9 * point["step"] / 500 if kind == "accuracy" else 10 - point["step"] / 100
    result["metric"]["retain_target"] = 0.9 if kind == "accuracy" else 4.9  # lower than any value
    figure = training(derive([result], "title"))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (name,) = axes.texts
    box = Text.get_window_extent(name)
    assert name.get_text() == "retain target" and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


def test_the_words_fit_one_learning_rate() -> None:
    result = with_one_rate(run())
    report = derive([result], "title")
    text = opening(report)
    assert "on the forget set at one learning rate, 1e-3. Before" in text
    assert "Only one learning rate was tried, so a stronger attack may exist." in text
    shown = printed(result)
    assert "relearning at the learning rate 1e-3" in shown and "[a] only one learning rate was tried" in shown
    said = " ".join([text, shown, *captions(report).values(), *(meaning for _, meaning in definitions(report))])
    assert not [words for words in ("of which the worst", "end of the grid", "worst rate", "rate that") if words in said]
    assert rates(report) is None, "it would repeat the figure of relearning"
    several = with_one_rate(run())
    for model in several["models"]:
        if model["attack"]:
            model["attack"]["curves"] *= 2
    report = derive([several], "title")
    assert "at one learning rate, 1e-3, in several data orders, of which the worst counts" in opening(report)


@pytest.mark.parametrize(
    ("kind", "original", "unlearned", "warned"),
    [
        ("accuracy", 0.98, 0.90, True),  # nine tenths of it are 0.882
        ("accuracy", 0.98, 0.88, False),
        ("accuracy", 0.0, 0.0, False),  # nothing to forget
        ("loss", 2.0, 2.1, True),  # exp(-0.1) = 0.905
        ("loss", 2.0, 2.11, False),  # exp(-0.11) = 0.896
        ("loss", 2.0, 3.4e38, False),
    ],
)
def test_a_teacher_that_has_hardly_forgotten(kind: str, original: float, unlearned: float, warned: bool) -> None:
    result = run(kind=kind)
    for name, value in {"original": original, "unlearn": unlearned}.items():
        entry(result, name)["metrics"]["forget"] = score(value)
    shown, text = " ".join(printed(result).split()), opening(derive([result], "title"))
    for said in (shown, text):
        assert ("he teacher has hardly forgotten, because its forget" in said) == warned
        assert ("raise unlearn.train.steps or unlearn.train.lr before you trust the rest" in said) == warned
    result["models"] = result["models"][1:]
    assert not derive([result], "title").hardly_forgotten, "without an original there is nothing to compare with"


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_terminal_table_fits_80_columns(seeds: int) -> None:
    results = [run(seed) for seed in range(seeds)]
    censor(results[0], "undo-0.6")
    text = printed(*results)
    assert "…" not in text and "data filtering" in text and "did not recover" in text
    assert "90.0" in text and "0.33" in text


def test_a_row_says_which_seeds_it_lacks() -> None:
    results = [run(0), run(1)]
    del results[1]["models"][-1]
    table = results_table(derive(results, "title"))
    (mark,) = (mark for mark, text in table.notes.items() if text.startswith("without seed 1"))
    assert [mark in row[0].marks for row in table.rows] == [False] * (len(table.rows) - 1) + [True]


def test_a_title_in_brackets_is_no_markup() -> None:
    assert "runs [/red] of [bold]: accuracy" in printed({**run(), "name": "runs [/red] of [bold]"})


def test_footnotes_do_not_look_like_part_of_a_name() -> None:
    result = run()
    censor(result, "undo-0.6")
    entry(result, "undo-0.2")["attack"]["worst_at_end_of_grid"] = True
    entry(result, "undo-0.6")["attack"]["worst_at_end_of_grid"] = True
    lines = printed(result).splitlines()
    names = [index for index, line in enumerate(lines) if line.strip().startswith("UNDO α=")]
    assert [lines[index].split()[1] for index in names] == ["α=0.2", "α=0.6"]
    assert [lines[index].split()[2] for index in names] == ["95.0", "95.0"], "the first number follows the name"
    assert [lines[index + 1].split()[0] for index in names] == ["[a]", "[a,b]"]
    assert any(line.startswith("[b] did not recover") for line in lines)
    report = derive([result], "title")
    table = results_table(report)
    assert "| UNDO α=0.6 [a,b] | 95.0" in markdown(table)
    assert "UNDO α=0.6<sup>a,b</sup>" in table_html(table)


def test_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(ValueError, match="results: got none"):
        derive([], "title")
    with pytest.raises(ValueError, match="each seed once"):
        derive([run(), run()], "title")
    with pytest.raises(ValueError, match="format 2, wanted 1"):
        derive([run() | {"format": 2}], "title")
    other = run(1)
    other["config"]["unlearn"]["method"] = "rmu"
    with pytest.raises(ValueError, match=r"seeds 0 and 1 differ in unlearn\.method"):
        derive([run(), other], "title")
    with pytest.raises(ValueError, match=r"differ in metric\.kind"):
        derive([run(), run(1, "loss")], "title")


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_stay_apart_in_order_and_in_range(values: list[float]) -> None:
    places = spread_apart(sorted(values), 0.05, 0.0, 1.0)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(places))
    assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread_apart([0.2, 0.5, 0.9], 0.05, 0.0, 1.0) == pytest.approx([0.2, 0.5, 0.9])


@pytest.mark.parametrize(
    ("name", "kept"), [("module://nowhere_to_be_found.backend", False), ("module://json", True), ("agg", True)]
)
def test_a_notebooks_backend_that_is_not_installed_is_dropped(monkeypatch, name, kept):
    """Matplotlib refuses to be imported with one, and a notebook passes its own to the commands that it starts."""
    monkeypatch.setenv("MPLBACKEND", name)
    importlib.reload(backend)
    assert ("MPLBACKEND" in os.environ) == kept
