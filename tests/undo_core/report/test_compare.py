"""The report on several runs: settings, worst cases over all attacks, points that name their runs, tables that parse."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sweep_results import STEPS, attacked, results, score

from undo_core.attacks import worst_of
from undo_core.cli import main
from undo_core.report import derive
from undo_core.report.attacks import envelope
from undo_core.report.claims import claims
from undo_core.report.compare import compare, comparison_table, load, write_comparison
from undo_core.report.compare_figures import robustness
from undo_core.report.compare_table import latex, methods_csv, methods_table
from undo_core.report.figures import relearning
from undo_core.report.points import FIGURES, plot_points
from undo_core.report.style import COLOURS
from undo_core.report.table import attack_table
from undo_core.report.words import captions, method_name

METHODS = {"maxent": "none", "rmu": "none", "maxent+sam": "sam"}


def methods(seeds: int = 2, **settings: Any) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            f"runs/m/runs/{name}",
            results(name, seed, name.partition("+")[0], robust, strength=1 - 0.2 * index, alphas=(0.4, 0.8), **settings),
        )
        for index, (name, robust) in enumerate(METHODS.items())
        for seed in range(seeds)
    ]


def entry(values: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model for model in values["models"] if model["name"] == name)


@pytest.mark.parametrize("loss", [False, True])
def test_the_worst_case_is_over_all_attacks(loss: bool) -> None:
    worst = max if not loss else min
    base = {"attack": attacked("x", 50.0, loss)}
    alone = envelope(base, 0, not loss, 100)
    assert list(alone) == STEPS and all(
        alone[step].value == worst(curve["forget"][i]["value"] for curve in base["attack"]["curves"])
        for i, step in enumerate(STEPS)
    )
    strong, weak = (0.0, 9.0) if loss else (0.99, 0.0)
    curve = {"rate": 5e-3, "stage": "relearn-lora", "forget": [score(weak), score(strong)], "retain": [score(0.5)] * 2}
    lora = {"kind": "lora", "headline_step": 100, "rates": [5e-3], "steps": [0, 100], "curves": [curve]}
    probe = {"kind": "quantise", "headline_step": 0, "steps": [0]}
    probe["curves"] = [{"stage": "probe-0", "forget": [score(alone[20].value)]}]
    all_of_them = {**base, "attacks": {"lora": lora, "int4": probe}}
    found = envelope(all_of_them, 0, not loss, 100)
    assert found[0].value == alone[20].value and found[0].attack == "int4" and found[0].stage == "probe-0"
    assert found[20].value == alone[20].value, "lora counts as at step 0"
    assert found[40] == alone[40] and found[100].attack == "lora" and found[200].value == strong, "as it was last evaluated"
    least = envelope(all_of_them, 0, not loss, 100, least=True)
    assert least[20].value == weak and list(least) == STEPS


def test_figures_draw_an_attack_at_its_own_steps() -> None:
    """The attack ``long`` has its headline step, 300, after that of the run, 100, at which the tables count it."""
    values = results("maxent", 0)
    long = {"kind": "finetune", "headline_step": 300, "steps": [0, 150, 300], "rates": [1e-3]}
    curve = {"rate": 1e-3, "stage": "long", "forget": [score(0.0), score(0.0), score(0.99)], "retain": [score(0.9)] * 3}
    for model in values["models"][1:]:
        model["attacks"] = {"long": {**long, "curves": [curve]}}
    report = derive([values], "t")
    filtered = next(model for model in report.models if model.kind == "filter")
    alone = envelope(entry(results("maxent", 0), "filter"), 0, True, 100)
    assert filtered.worst[100].mean == 0.99, "the worst case of the tables"
    shown = {step: point.value for step, point in alone.items()} | {150: alone[100].value, 300: 0.99}
    (line,) = [
        dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in relearning(report).axes[0].lines
        if line.get_color() == COLOURS["filter"]
    ]
    assert line == shown
    assert relearning(report).axes[0].get_xlim() == (0, 300)
    found = compare([("runs/a", values)], "t")
    points = [p for p in plot_points(found) if (p.figure, p.series) == ("envelopes", "filter")]
    assert {point.x: point.y for point in points} == shown
    assert "Each attack is drawn at its own steps; the tables" in captions(report)["relearning"]


@pytest.mark.parametrize("loss", [False, True])
def test_the_report_and_the_results_have_one_worst_case(loss: bool) -> None:
    weak, strong, stronger = (9.0, 0.5, 0.1) if loss else (0.0, 0.98, 0.99)

    def further(headline: int, steps: list[int], *curves: list[float]) -> dict[str, Any]:
        rates = [1e-3 * (index + 1) for index in range(len(curves))]
        made = [
            {"rate": rate, "stage": f"own-{headline}-{rate:g}", "forget": list(map(score, c)), "retain": [score(0.5)] * len(c)}
            for rate, c in zip(rates, curves, strict=True)
        ]
        return {"kind": "finetune", "headline_step": headline, "rates": rates, "steps": steps, "curves": made}

    values = results("maxent", alphas=(0.8,), loss=loss)
    model = entry(values, "undo-0.8")
    late = further(500, [0, 100, 500], [weak, weak, weak], [weak, weak, strong])
    early = further(20, [0, 20, 100], [weak, weak, stronger])
    model["attacks"] = {"late": late, "early": early}
    saved = worst_of(model, values["metric"])
    shown = next(m for m in derive([values], "t").models if m.name == "undo-0.8").worst
    (point,) = shown[100].points
    assert (saved["attack"], saved["step"], saved["forget"]["value"]) == ("late", 500, strong)
    assert (point.attack, point.stage, point.value) == ("late", "own-500-0.002", strong)
    assert shown[200].points[0].value == stronger, "elsewhere as it was last evaluated"


def test_r_counts_further_attacks() -> None:
    values = results("maxent", alphas=(0.8,))
    before = next(m for m in derive([values], "t").models if m.name == "undo-0.8")
    broken = {"kind": "lora", "headline_step": 100, "rates": [1.0], "steps": [0, 100]}
    broken["curves"] = [{"rate": 1.0, "forget": [score(0.0), score(0.9)]}]
    entry(values, "undo-0.8")["attacks"] = {"lora": broken}
    after = next(m for m in derive([values], "t").models if m.name == "undo-0.8")
    ends = [entry(values, name)["attack"] for name in ("unlearn", "filter")]
    unlearn, control = (max(curve["forget"][3]["value"] for curve in attack["curves"]) for attack in ends)
    assert (
        after.robustness.mean == pytest.approx((0.9 - unlearn) / (control - unlearn)) != pytest.approx(before.robustness.mean)
    )


def test_each_attack_has_a_line_with_its_own_worst_case() -> None:
    loaded = []
    for seed in range(2):
        values = results("x", seed)
        for model in values["models"]:
            if model["attack"]:
                long = {"kind": "finetune", "headline_step": 500, "rates": [1e-4, 1e-3], "steps": [0, 100, 500]}
                long["curves"] = [
                    {"rate": rate, "forget": [score(0.0), score(0.99), score(high + 0.1 * seed)]}
                    for rate, high in ((1e-4, 0.3), (1e-3, 0.6))
                ]
                model["attacks"] = {
                    "long": long,
                    "int4": {"headline_step": 0, "steps": [0], "curves": [{"forget": [score(0.01)]}]},
                }
        loaded.append(values)
    table = attack_table(derive(loaded, "t"))
    assert [(row[0].main, row[1].main) for row in table.rows] == [("fine-tuning", "100"), ("long", "500"), ("int4", "0")]
    unlearn = [name for name, _ in table.headers].index("unlearn only")
    assert (table.rows[1][unlearn].main, table.rows[1][unlearn].spread) == ("65.0", "60.0–70.0"), (
        "not step 100, not the lower rate"
    )
    assert table.rows[1][unlearn].remark == "at 1e-3" and table.rows[2][unlearn].main == "1.0"
    curves = [entry(values, "unlearn")["attack"]["curves"] for values in loaded]
    alone = sum(max(curve["forget"][STEPS.index(100)]["value"] for curve in of) for of in curves) / 2
    assert table.rows[0][unlearn].main == f"{100 * alone:.1f}"
    assert not attack_table(derive([results("x")], "t")).rows, "one attack is in the table of results"


def test_runs_that_differ_in_seed_or_alphas_are_one_setting() -> None:
    loaded = [("runs/a", results("alphas=0.2", seed, alphas=(0.2,))) for seed in range(2)]
    loaded += [("runs/b", results("alphas=0.6", seed, alphas=(0.6,))) for seed in range(2)]
    for _, values in loaded[2:]:  # shared stages have one name
        for name in ("original", "unlearn", "random", "filter", "oracle", "oracle-random"):
            entry(values, name)["stage"] = entry(loaded[values["seed"]][1], name)["stage"]
    (setting,) = compare(loaded, "t")
    assert [model.name for model in setting.report.of("undo")] == ["undo-0.2", "undo-0.6"] and setting.report.seeds == [0, 1]
    assert setting.origins["undo-0.6", 1] == "runs/b" and setting.origins["unlearn", 1] == "runs/a"
    other = results("other", 0, alphas=(0.2,))
    with pytest.raises(ValueError, match="two models original of seed 0"):
        compare([*loaded, ("runs/c", other)], "t")


def test_data_filtering_is_trained_once_for_all_methods() -> None:
    """A method without data filtering uses that of the method that has it, seed by seed, and a footnote says so."""
    loaded = methods()
    for _, values in loaded[2:]:
        values["models"] = [model for model in values["models"] if not model["kind"].startswith(("filter", "oracle"))]
    first, second, _ = compare(loaded, "t")
    assert first.lender is None and second.lender == "MaxEnt"
    (model,) = (m for m in second.report.models if m.name == "undo-0.4")
    for seed in range(2):

        def after(values: dict[str, Any], name: str) -> float:
            curves = entry(values, name)["attack"]["curves"]
            return max(curve["forget"][STEPS.index(100)]["value"] for curve in curves)

        ours, theirs = loaded[2 + seed][1], loaded[seed][1]
        unlearned, filtered = after(ours, "unlearn"), after(theirs, "filter")
        assert model.robustness.points[seed].value == pytest.approx(
            (after(ours, "undo-0.4") - unlearned) / (filtered - unlearned)
        )
        spent = [entry(v, name)["training"]["stop_step"] for v, name in ((ours, "undo-0.4"), (theirs, "filter"))]
        assert model.compute["steps"].points[seed].value == pytest.approx((spent[0] + 60) / spent[1])
        assert second.origins["filter", seed] == "runs/m/runs/maxent"
    for _, values in loaded[
        2:4
    ]:  # data filtering, whose history is .18, .36, ..., .9 at 200, 400, ..., 1000 steps, met this at 800
        values["metric"]["retain_target"] = 0.7
    for _, values in loaded[4:]:
        values["metric"]["retain_target"] = 0.91
    _, earlier, never = compare(loaded, "t")
    (model,) = (m for m in earlier.report.models if m.name == "undo-0.4")
    for unit, extra in (("steps", 60), ("tokens", 0), ("flops", 0)):
        name = {"steps": "stop_step", "tokens": "stop_tokens", "flops": "stop_flops"}[unit]
        mine, base = (entry(loaded[at][1], kind)["training"][name] for at, kind in ((2, "undo-0.4"), (0, "filter")))
        assert model.compute[unit].points[0].value == pytest.approx((mine + extra) / (0.8 * base))
    (model,) = (m for m in never.report.models if m.name == "undo-0.4")
    assert not model.compute["steps"] and "ended before it met" in model.compute["steps"].missing[0] and model.robustness
    for _, values in loaded:
        values["metric"]["retain_target"] = 0.87
    assert {p.run for p in plot_points([second]) if p.series == "filter"} == {"runs/m/runs/maxent"}
    table = methods_table(compare(loaded, "t"))
    assert sum(row[1].main == "data filtering" for row in table.rows) == 1
    (mark,) = (mark for mark, text in table.notes.items() if "data filtering of MaxEnt" in text)
    marked = {row[0].main for row in table.rows if mark in row[6].marks and mark in row[7].marks}
    assert marked == {"RMU", "MaxEnt + SAM"}
    loaded[3][1]["models"].append(copy.deepcopy(entry(loaded[1][1], "filter")))  # of one seed its own
    second = compare(loaded, "t")[1]
    assert second.lender is None and set(second.report.of("filter")[0].entries) == {1}
    for _, values in loaded[2:]:
        values["config"]["relearn"] = {"batch_size": 8}  # another attack: nothing to compare with
    other = compare(loaded, "t")[1]
    assert other.lender is None and [p.seed for p in other.report.of("undo")[0].robustness.points] == [1]


def test_the_figure_of_robustness_shows_what_the_table_says() -> None:
    """Means over seeds in both; three seeds, because the mean of two is their median."""
    settings = compare(methods(3), "t")
    figure = robustness(settings, [point for point in plot_points(settings) if point.figure == "robustness"])
    for axes, unit in zip(figure.axes, ("steps", "flops"), strict=True):
        drawn = [line.get_xydata()[0] for line in axes.lines if len(line.get_xydata()) == 1]
        students = [
            model for setting in settings for model in setting.report.models if model.robustness and model.compute[unit]
        ]
        assert students and all(statistics.median(p.value for p in m.robustness.points) != m.robustness.mean for m in students)
        for model in students:
            shown = (model.compute[unit].mean, model.robustness.mean)
            assert any(point == pytest.approx(shown) for point in drawn)


def test_settings_are_named_by_what_tells_them_apart() -> None:
    assert [s.label for s in compare(methods(1), "t")] == ["MaxEnt", "RMU", "MaxEnt + SAM"]
    same = [("runs/a", results("x", beta=0.1)), ("runs/b", results("x", beta=0.5))]
    assert [s.label for s in compare(same, "t")] == ["x (beta=0.1)", "x (beta=0.5)"]
    assert method_name("beta=0.1,rows=30") == "β=0.1, rows=30" and method_name("my-run") == "my-run"


def test_runs_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["rows=30", "rows=100", "rows=1000", "rows=1000-again", "other"]
    for name in names:
        for seed in (2, 10):
            (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / name / f"results-seed{seed}.json").write_text(json.dumps(results(name, seed)))
    found = [(Path(run).name, values["seed"]) for run, values in load([tmp_path])]
    assert found == [(name, seed) for name in [names[-1], *names[:-1]] for seed in (2, 10)]


def test_what_does_not_belong_together_is_refused() -> None:
    text = results("text", loss=True)
    with pytest.raises(ValueError, match=r"MaxEnt and text differ in metric\.kind"):
        compare([*methods(1), ("runs/text", text)], "t")
    late = results("late", lr=1)
    late["metric"]["headline_step"] = 200
    with pytest.raises(ValueError, match=r"differ in metric\.headline"):
        compare([*methods(1), ("runs/late", late)], "t")


@pytest.mark.parametrize("loss", [False, True])
def test_every_plotted_value_is_in_the_results_of_its_run(loss: bool) -> None:
    loaded = methods(2, loss=loss)
    held = {(run, values["seed"]): values for run, values in loaded}
    points = plot_points(compare(loaded, "t"))
    assert {point.figure for point in points} == {"overview", "oracle", "methods", "envelopes", "robustness"}
    for point in points:
        values = held[point.run, point.seed]
        stages = {model["stage"]: model["metrics"] for model in values["models"]}
        curves = {c["stage"]: c for m in values["models"] for c in (m["attack"] or {"curves": []})["curves"]}
        if point.figure == "robustness":
            assert point.stage in stages
        elif point.stage in stages:
            assert point.y in (stages[point.stage]["retain"]["value"], stages[point.stage]["forget"]["value"])
        else:
            curve = curves[point.stage]
            assert point.y in [at["value"] for name in ("forget", "retain") for at in curve[name]]
    # the worst case after the headline step, by hand
    (drawn,) = [
        p for p in points if (p.figure, p.panel, p.series, p.x, p.seed) == ("overview", "forget", "undo, after", "RMU", 1)
    ]
    attack = entry(held["runs/m/runs/rmu", 1], "undo-0.8")["attack"]
    assert drawn.y == (min if loss else max)(curve["forget"][STEPS.index(100)]["value"] for curve in attack["curves"])


def test_label_budgets_are_drawn_where_they_were_swept() -> None:
    loaded = [(f"runs/{n}", results(f"rows={n}", strength=n**0.1, labelled=n)) for n in (30, 300)]
    points = [point for point in plot_points(compare(loaded, "t")) if point.figure == "labels"]
    assert {(p.panel, p.series, p.x) for p in points} >= {("R", "MaxEnt, undo", 30), ("forget", "MaxEnt, unlearn", 300)}
    seeds = [("runs/x", results("x", seed, labelled=30 + seed)) for seed in range(2)]
    seeds += [("runs/y", results("y", seed, labelled=30 + seed, lr=1)) for seed in range(2)]
    assert not [point for point in plot_points(compare(seeds, "t")) if point.figure == "labels"], "seeds are no budgets"
    used = {"pretraining_tokens": 1000, "labelled_tokens": {"forget": 7, "retain": 8}, "labelled_share": 0.015}
    for _, values in loaded:  # a token that was read twice counts as one label
        entry(values, "unlearn")["costs"] = used
    assert not [point for point in plot_points(compare(loaded, "t")) if point.figure == "labels"]


def test_the_strongest_alpha_that_is_not_censored_stands_for_the_method() -> None:
    loaded = [("runs/a", results("x", seed, censored=(0.8,) if seed else ())) for seed in range(2)]
    assert compare(loaded, "t")[0].report.strongest.name == "undo-0.6"
    loaded = [("runs/a", results("x", censored=(0.2, 0.4, 0.6, 0.8)))]
    assert compare(loaded, "t")[0].report.strongest.name == "undo-0.8"


def test_the_claims_stand_beside_the_published_ones() -> None:
    values = results("x", labelled=300)
    labels, compute = claims(derive([values], "t"))
    assert "600 labelled tokens" in labels and "0.05 %" in labels
    student, control = (entry(values, name)["training"]["stop_step"] for name in ("undo-0.8", "filter"))
    assert f"and {100 * (student + 60) / control:.0f} % of its training steps." in compute
    spent, whole = (entry(values, name)["training"]["stop_flops"] for name in ("undo-0.8", "filter"))
    assert f"at {100 * spent / whole:.0f} % of data filtering's FLOPs" in compute, "which leads"
    for model in values["models"]:
        model["training"] = None
    assert claims(derive([values], "t")) == []


def test_the_tables_parse() -> None:
    loaded = methods(2)
    for _, values in loaded[:2]:
        values["name"] = "50% & more_{x} \\ #1"
    settings = compare(loaded, "t")
    table = methods_table(settings)
    text = latex(table)
    body = text[text.index("\n") + 1 : text.index(r"\end{tabular}")]
    columns = re.match(r"\\begin\{tabular\}\{([lr]+)\}", text)[1]
    lines = [line for line in body.splitlines() if line != r"\hline"]
    assert len(lines) == 2 + 3 * 3 and len(columns) == len(table.headers)
    for line in lines:
        assert line.endswith(r" \\") and len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1
        bare = re.sub(r"\\[&%$#_{}]|\\text\w+\{\}|\\alpha", "", line.removesuffix(r" \\"))
        assert (
            not re.search(r"[%#_\\^~]", bare)
            and bare.count("$") % 2 == 0
            and bare.isascii()
            and bare.count("{") == bare.count("}")
        )
    assert r"50\% \& more\_\{x\} \textbackslash{} \#1" in text
    rows = list(csv.DictReader(io.StringIO(methods_csv(settings))))
    assert len(rows) == 3 * 8
    undo = next(row for row in rows if row["method"] == "RMU" and row["model"] == "undo-0.8")
    points = settings[1].report.strongest.worst[100].points
    assert float(undo["forget_attacked"]) == pytest.approx(sum(p.value for p in points) / 2) and undo["seeds"] == "0 1"
    assert float(undo["R_max"]) == max(p.value for p in settings[1].report.strongest.robustness.points)


def test_the_folder(tmp_path: Path) -> None:
    loaded = methods(2)
    before = copy.deepcopy(loaded)
    page = write_comparison(loaded, tmp_path / "report", "A <title>")
    assert loaded == before and page == tmp_path / "report" / "comparison.html"
    drawn = {path.stem for path in page.parent.glob("*.png")}
    assert drawn == set(FIGURES) - {"labels"}
    text = page.read_text()
    assert "A &lt;title&gt;" in text and text.count("data:image/png;base64,") == len(drawn) and "<script" not in text
    assert "undo sweep rmu.yaml" in text and "runs/m/runs/maxent+sam" in text and text.count("labels for 0.01 %") == 1
    with open(page.parent / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == drawn and set(rows[0]) >= {"figure", "series", "x", "y", "seed", "run", "stage"}
    assert {row["run"] for row in rows} == {run for run, _ in loaded}
    numbers = json.loads((page.parent / "comparison.json").read_text())
    assert [setting["label"] for setting in numbers["settings"]] == ["MaxEnt", "RMU", "MaxEnt + SAM"]
    written = {path: path.stat().st_mtime_ns for path in page.parent.iterdir()}
    write_comparison(loaded, page.parent, "A <title>")
    assert {path: path.stat().st_mtime_ns for path in page.parent.iterdir()} == written, "the same results: nothing to do"
    (page.parent / "points.csv").unlink()
    write_comparison(loaded, page.parent, "A <title>")
    assert (page.parent / "points.csv").exists(), "a file that is gone is made again"
    plain = [(run, {**values, "models": values["models"][:-2]}) for run, values in loaded[:1]]
    write_comparison(plain, page.parent, "A <title>")
    assert "oracle" not in {path.stem for path in page.parent.glob("*.png")}, "of the earlier report"


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, values in methods(1):
        folder = tmp_path / run
        folder.mkdir(parents=True)
        (folder / f"results-seed{values['seed']}.json").write_text(json.dumps(values))
    sweep, one = tmp_path / "runs" / "m", tmp_path / "runs" / "m" / "runs" / "rmu"
    assert len(load([sweep, one])) == 3, "each file once"
    assert main(["report", str(one), "--title=One"]) == 0
    assert "labels for 0.01 %" in (one / "report" / "report.html").read_text()
    assert "60–80 %" in (one / "report" / "table.md").read_text() and (one / "report" / "comparison.html").exists()
    capsys.readouterr()
    assert main(["report", str(one), str(sweep)]) == 2 and "output: got none" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "has no results-seedN.json" in capsys.readouterr().err


def test_the_terminal_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(comparison_table(methods(2)))
    text = console.export_text()
    assert "…" not in text and "MaxEnt + SAM" in text and "UNDO α=0.8" in text and "data filtering" in text


def test_a_method_alone_shows_every_model() -> None:
    loaded = [("runs/a", results("x", seed)) for seed in range(2)]
    rows = methods_table(compare(loaded, "t")).rows
    assert len(rows) == len(loaded[0][1]["models"]) - 1 and {row[0].main for row in rows} == {"MaxEnt"}, "all but the original"
    assert rows[0][5].main == "fine-tuning at 2e-3" and [row[1].main for row in rows][1:3] == ["UNDO α=0.2", "UNDO α=0.4"]
    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(comparison_table(loaded))
    text = console.export_text()
    assert "oracle matching, random student" in text and "after 100" in text and "MaxEnt" not in text
