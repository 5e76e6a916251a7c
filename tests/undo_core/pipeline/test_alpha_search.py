"""The search for the cheapest alpha that reaches a target of robustness: its rule, its stages, and that it ends where it began."""

import dataclasses
import math

import pytest
from tiny_run import small_run
from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.io.files import read_json
from undo_core.noise.config import NoiseConfig
from undo_core.noise.damage import DamageConfig
from undo_core.pipeline import run as running
from undo_core.pipeline.alpha_search import AlphaSearch
from undo_core.pipeline.config import ControlsConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.run import missing_stages, searched
from undo_core.pipeline.stages import Distill, Noise, Pretrain, Relearn, Unlearn
from undo_core.pipeline.student_config import StudentConfig
from undo_core.report.alpha_search import outcomes
from undo_core.report.derivation import derive

CURVES = {
    "linear": lambda alpha: 1.1 * alpha,
    "late": lambda alpha: alpha**6 * 1.8,
    "early": lambda alpha: 1 - math.exp(-5 * alpha),
    "step": lambda alpha: float(alpha > 0.531),
}


def search_with(outcome, configured, target=0.9, resolution=0.02, tries=30, largest=0.9):
    """Follows a search to its end; returns R by alpha in the order of the tries, and why it ended."""
    search = AlphaSearch(target, resolution, tries, largest, len(configured))
    tried = {alpha: outcome(alpha) for alpha in configured}
    while not isinstance(following := search.following(tried), str):
        assert following not in tried
        tried[following] = outcome(following)
    return tried, following


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("configured", [(0.4, 0.6, 0.8), (0.5,), (0.1, 0.87)])
@pytest.mark.parametrize("target", [0.2, 0.65, 0.9])
def test_it_finds_the_smallest_multiple_of_the_resolution(curve, configured, target):
    tried, ended = search_with(curve, configured, target)
    reached = [alpha for alpha, value in tried.items() if value >= target]
    best = min(reached)
    candidates = [*configured, *(0.02 * index for index in range(1, 46))]
    assert best - min(alpha for alpha in candidates if curve(alpha) >= target - 1e-12) <= 0.02 + 1e-9
    assert curve(best - 0.02) < target and "resolution" in ended
    # Each try leaves three quarters of the interval between two configured alphas, or between one of them and an end.
    assert len(tried) - len(configured) <= 2 + math.log(0.9 / 0.02) / math.log(4 / 3)


def test_the_line_through_both_ends_decides_unless_it_points_outside_the_middle_half():
    search = AlphaSearch(0.9, 0.01, 9, 0.9, 2)
    assert search.following({0.4: 0.6, 0.8: 1.1}) == 0.64, "0.4 + 0.4 * (0.9 - 0.6) / (1.1 - 0.6)"
    assert search.following({0.4: 0.89, 0.8: 1.1}) == 0.6, "the line would leave most of the interval: plain bisection"
    assert search.following({0.4: None, 0.8: 1.1}) == 0.6, "R of a student that was not repaired is unknown"


def test_none_reaches():
    tried, ended = search_with(lambda alpha: 0.5 * alpha, (0.2, 0.6))
    assert list(tried) == [0.2, 0.6, 0.9] and "no larger alpha" in ended
    tried, ended = search_with(lambda alpha: 0.5 * alpha, (0.2, 0.95))
    assert list(tried) == [0.2, 0.95], "a configured alpha beyond the largest counts"


def test_students_that_cannot_be_repaired_bound_the_search():
    tried, ended = search_with(lambda alpha: None if alpha > 0.7 else alpha, (0.4, 0.6))
    assert list(tried)[2] == 0.9 and "no student" in ended
    assert {alpha for alpha, value in tried.items() if value is None and alpha <= 0.72}, "down to the resolution"
    tried, ended = search_with(lambda alpha: None if alpha > 0.7 else alpha, (0.4, 0.6), target=0.65)
    assert min(alpha for alpha, value in tried.items() if value and value >= 0.65) == 0.66 and "resolution" in ended


def test_the_budget_and_an_undefined_r_end_it():
    tried, ended = search_with(CURVES["late"], (0.4, 0.8), tries=2)
    assert len(tried) == 4 and "budget of 2" in ended
    _, ended = search_with(lambda alpha: "data filtering did not recover", (0.4, 0.8))
    assert ended == "R of α = 0.4 is not defined (data filtering did not recover)"


def test_noise_in_r_does_not_trap_it():
    values = {0.4: 0.95, 0.6: 0.7, 0.8: 1.0}
    tried, ended = search_with(lambda alpha: values.get(alpha, 0.3), tuple(values))
    assert min(alpha for alpha, value in tried.items() if value >= 0.9) == 0.4 and "resolution" in ended


# -- in a run ------------------------------------------------------------------------------------------------------------------


class Answers:
    """A store in which stages are finished once they are marked, and in which the robustness of a student is its alpha."""

    def __init__(self, forget):
        self.finished, self.forget = set(), forget

    def done(self, stage):
        return stage.key in self.finished

    def manifest(self, stage):
        if isinstance(stage, Relearn):
            value = self.forget(stage.inputs["model"])
            score = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 900}
            return {"curve": [{"step": step, "forget": score, "retain": score} for step in (0, 1)]}
        facts = {"splits": {}, "steps": 4, "tokens": 40, "flops": 4e6, "seconds": 1.0, "peak_bytes": 1, "history": []}
        return {**facts, "stopped": "recovered", "limit_reached": False, "retain_target": 0.5}


def forget_of(model):
    """Forget accuracy after the attack: 0.9 for the teacher, 0.2 for a control; a student's R is its alpha."""
    if isinstance(model, (Unlearn, Pretrain)):
        return 0.9 if isinstance(model, Unlearn) else 0.2
    student = model.inputs["student"]
    return 0.9 - 0.7 * student.alpha if isinstance(student, Noise) else 0.2


def config(output="unused", **changes):
    values = {
        "target_robustness": 0.7,
        "noise": NoiseConfig(alphas=[0.4, 0.8]),
        "controls": ControlsConfig(random=False),
    }
    return small_run("search", output, **{**values, **changes})


def test_further_students_stay_in_a_run_that_tries_more_alphas():
    own = StudentConfig(alpha=0.4, rules=[NoiseRule("embeddings", alpha=0.2)])
    settings = config(students={"own": own}, alpha_tries=1, retain_margin=0.05)
    graph, store = graph_of(settings), Answers(forget_of)
    while stages := missing_stages(store, settings, graph):
        store.finished |= {stage.key for stage in stages}
    grown = searched(store, settings, graph)
    assert [m.alpha for m in grown.models if m.kind == "undo"] not in ([], [0.4, 0.8]), "one more was tried"
    assert [m for m in grown.models if m.kind == "damaged"] == [m for m in graph.models if m.kind == "damaged"] != []


@pytest.mark.parametrize("controls", [{"random": False}, {"filter": False}], ids=["filter", "random"])
def test_a_run_grows_by_the_alphas_of_its_search(controls):
    settings = config(controls=ControlsConfig(**controls), damage=DamageConfig(operators=["prune"]))
    graph, store, tried = graph_of(settings), Answers(forget_of), []
    while stages := missing_stages(store, settings, graph):
        tried += [
            s.inputs["student"].alpha for s in stages if isinstance(s, Distill) and isinstance(s.inputs["student"], Noise)
        ]
        assert missing_stages(store, settings, graph) == stages, "asked again it decides the same"
        store.finished |= {stage.key for stage in stages}
    assert tried[:3] == [0.4, 0.8, 0.6] or tried[:3] == [0.4, 0.8, 0.7]
    assert min(alpha for alpha in tried if alpha >= 0.7 - 1e-12) == 0.7 and max(a for a in tried if a < 0.7) == 0.68
    models = searched(store, settings, graph).models
    assert sorted(tried) == [model.alpha for model in models if model.kind == "undo"]
    assert [model.alpha for model in models if model.kind == "damaged"] == [0.4, 0.8], "only the noise is searched"
    own = DamageConfig(operators=["prune"], alphas=[0.4, 0.8])
    plain = dataclasses.replace(settings, noise=NoiseConfig(alphas=sorted(tried)), damage=own, target_robustness=None)
    assert not missing_stages(store, plain, graph_of(plain)), "a run with the tried alphas has the same stages"


def test_the_search_and_the_report_have_one_r(monkeypatch):
    settings = config(alpha_tries=1)
    graph, store, seen = graph_of(settings), Answers(forget_of), []
    monkeypatch.setattr(running, "outcomes", lambda results: (seen.append(results), outcomes(results))[1])
    while stages := missing_stages(store, settings, graph):
        store.finished |= {stage.key for stage in stages}
    for results in seen:
        shown = {m.alpha: m.robustness.mean for m in derive([results], "").of("undo")}
        assert outcomes(results) == shown and all(value == pytest.approx(alpha) for alpha, value in shown.items())


def test_a_real_run_records_its_search_and_continues(tmp_path, monkeypatch):
    monkeypatch.setattr(
        running, "outcomes", lambda results: {m["alpha"]: m["alpha"] for m in results["models"] if m["kind"] == "undo"}
    )
    plain = ControlsConfig(random=True, filter=False)
    settings = config(
        tmp_path, target_robustness=0.45, alpha_resolution=0.1, controls=plain, noise=NoiseConfig(alphas=[0.3, 0.5])
    )
    page = running.run(settings, "test")
    results = read_json(tmp_path / "results-seed0.json")
    assert results["alpha_search"] == {
        **{"target": 0.45, "resolution": 0.1, "tries": 8, "largest": 0.9, "configured": 2},
        **{"tried": [0.3, 0.5, 0.4], "ended": "neighbouring alphas are as close as the resolution"},
    }
    assert [m["name"] for m in results["models"] if m["kind"] == "undo"] == [
        f"undo-{a:g}" for a in sorted(results["alpha_search"]["tried"])
    ]
    assert "The search for an alpha" in page.read_text() and "The search for an alpha" in (page.parent / "table.md").read_text()
    monkeypatch.setattr(running, "run_stages", lambda *_: pytest.fail("a stage was run again"))
    running.run(settings, "test")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_robustness": 0.0}, "target_robustness: got 0.0"),
        ({"target_robustness": math.nan}, "target_robustness: got nan"),
        (
            {"target_robustness": 0.9, "controls": ControlsConfig(filter=False, random=False)},
            "controls.filter or controls.random",
        ),
        ({"alpha_resolution": 0.0}, "alpha_resolution: got 0.0"),
        ({"alpha_tries": 0}, "alpha_tries: got 0"),
        ({"alpha_max": 1.5}, "alpha_max: got 1.5"),
    ],
)
def test_a_wrong_setting_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)
