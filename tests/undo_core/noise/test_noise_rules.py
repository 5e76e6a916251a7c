"""The settings of each parameter under a policy, and the errors of an impossible policy."""

import math

import pytest
import torch
from rounding import assert_rounded, gamma
from torch import nn
from undo_kernels.ops.noise import apply
from undo_kernels.ops.noise_rules import canonical_name

from undo_core import NoiseRule, noise_, ops
from undo_core.noise.model import TensorNoise, by_kind, report


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.conv = nn.Conv1d(4, 6, 3, bias=False)
        self.experts = nn.Parameter(torch.randn(5, 6, 4))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight


def noised(model, **options):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = noise_(model, alpha=0.5, beta=0.8, seed=5, toward=0.0, **options)
    return before, dict(model.named_parameters()), report


def test_classes_globs_and_the_last_rule_wins():
    rules = [
        NoiseRule("matrices", alpha=0.25),
        NoiseRule("layers.1.*", alpha=0.0),
        NoiseRule("embeddings", beta=0.0),
        NoiseRule("vectors", toward=2.0),
        NoiseRule("layers.2.bias", law="normal", std=0.1, toward=0.0),
    ]
    before, after, report = noised(Model(), rules=rules)

    def wanted(name, alpha, beta, drawn):
        return before[name].double() * (1 - alpha) + alpha * beta * drawn

    cases = {
        "embed.weight": (0.5, 0.0, torch.zeros(9, 4)),
        "layers.0.weight": (0.25, 0.8, ops.replay("layers.0.weight", (4, 4), seed=5)),
        "layers.1.weight": (0.0, 0.0, torch.zeros(4, 4)),
        "layers.0.bias": (0.5, 1.0, torch.full((4,), 2.0)),
        "layers.1.bias": (0.0, 0.0, torch.zeros(4)),
        "layers.2.bias": (0.5, 0.8, ops.replay("layers.2.bias", (4,), seed=5, law="normal", std=0.1)),
    }
    for name, (alpha, beta, drawn) in cases.items():
        # two products and a sum; factors and draws are float32 too
        assert_rounded(after[name], wanted(name, alpha, beta, drawn), before[name].abs() + drawn.abs(), terms=6)
    assert report["layers.1.weight"].noise == 0 and report["layers.1.weight"].before == report["layers.1.weight"].after


def test_fans_of_convolutions_and_of_stacked_matrices():
    before, after, _ = noised(Model())
    for name, limit in (("conv.weight", math.sqrt(6 / ((6 + 4) * 3))), ("experts", math.sqrt(6 / (6 + 4)))):
        drawn = (after[name].double() - 0.5 * before[name].double()) / (0.5 * 0.8)
        assert drawn.abs().max() <= limit * (1 + 1e-5)
        assert drawn.abs().max() > 0.9 * limit, "of 72 and 120 draws the largest is near"
    drawn = ops.replay("experts", (5, 6, 4), seed=5, stacked=True)
    wanted = 0.5 * before["experts"].double() + 0.4 * drawn
    assert_rounded(after["experts"], wanted, before["experts"].abs() + drawn.abs(), terms=6)


def test_the_report_tells_norms_and_shares():
    before, after, report = noised(Model())
    assert list(report) == list(before), "tied weights once"
    for name, got in report.items():
        change = after[name].detach().double() - before[name].double()
        assert got.before == pytest.approx(float(before[name].double().norm()), rel=gamma(16))
        assert got.after == pytest.approx(float(after[name].detach().double().norm()), rel=gamma(16))
        assert got.shrink + got.noise == pytest.approx(1.0)
        if before[name].ndim > 1:
            noise = change + 0.5 * before[name].double()
            shares = [float(part.square().sum()) for part in (0.5 * before[name].double(), noise)]
            # The noise has an error of the weights' roundings; the factors are float32.
            room = gamma(16) + 2 * gamma(6) * float(after[name].detach().double().norm()) / shares[1] ** 0.5
            assert got.noise == pytest.approx(shares[1] / sum(shares), rel=room)
        else:
            room = gamma(16) * float(before[name].double().norm() + after[name].detach().double().norm())
            assert got.noise == 0 and got.change == pytest.approx(float(change.norm()), abs=room)


def test_a_vector_that_is_where_it_shrinks_to_does_not_change():
    vector = {"norm": torch.ones(8)}
    moved = report(apply(vector, alpha=0.6, beta=0.1, seed=0, toward=3.0))["norm"]
    assert moved.change == pytest.approx(0.6 * 2 * 8**0.5, rel=gamma(16)) and moved.shrink == 1.0
    vector["norm"].fill_(1.0)
    still = report(apply(vector, alpha=0.6, beta=0.1, seed=0, toward=1.0))["norm"]
    # The remaining error is the square root of a rounding of the squares.
    assert still.change <= gamma(16) ** 0.5 * still.before and still.before == pytest.approx(still.after)


def test_the_report_by_kind_adds_squares():
    _, _, report = noised(Model())
    kinds = by_kind(report)
    assert set(kinds) == {"experts", "embed.weight", "layers.*.weight", "layers.*.bias", "conv.weight"}
    count, total = kinds["layers.*.weight"]
    parts = [report[f"layers.{i}.weight"] for i in range(3)]
    assert count == 3 and total.after == pytest.approx(math.hypot(*(part.after for part in parts)))
    noise = sum(part.noise * part.change**2 for part in parts)
    assert total.noise == pytest.approx(noise / total.change**2) and total.shrink + total.noise == pytest.approx(1.0)


def test_a_parameter_without_a_dimension_shrinks_as_vectors_do():
    class Scaled(Model):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

    before, after, report = noised(Scaled(), rules=[NoiseRule("scale", alpha=0.0)])
    assert after["scale"].item() == 3.0 and report["scale"] == TensorNoise(3.0, 3.0, 0.0, 0.0, 0.0)
    assert not torch.equal(after["layers.0.weight"], before["layers.0.weight"])
    for rules, wanted in (([], 1.5), ([NoiseRule("vectors", toward=2.0)], 2.5)):
        _, after, report = noised(Scaled(), rules=rules)
        assert after["scale"].item() == wanted and report["scale"].noise == 0


def test_a_rule_spares_a_vector_that_starts_from_several_values():
    _, after, _ = noised(Model(), rules=[NoiseRule("layers.0.bias", alpha=0.0)])
    model = Model()
    model.layers[0].bias = after["layers.0.bias"]
    rule = NoiseRule("layers.0.bias", alpha=0.0)
    toward = {name: 0.0 for name, p in model.named_parameters() if p.ndim == 1 and name != "layers.0.bias"}
    apply(model, alpha=0.5, beta=0.1, seed=0, toward=toward, rules=[rule])
    with pytest.raises(ValueError, match=r"^toward: got no value for layers.0.bias, wanted an entry"):
        apply(model, alpha=0.5, beta=0.1, seed=0, toward=toward)


@pytest.mark.parametrize("share", [lambda w: w[2:], lambda w: w.view(-1), lambda w: w.view(-1)[6:14], lambda w: w.view(2, 10)])
def test_tensors_that_share_a_part_of_their_memory_are_refused_by_name(share):
    whole = torch.ones(4, 5)
    with pytest.raises(ValueError, match=r"^tensors: got '(w|part)' and '(w|part)', which share memory, wanted"):
        ops.noise_({"part": share(whole), "w": whole, "other": torch.ones(3)}, alpha=0.5, beta=0.1, seed=0)
    assert (whole == 1).all()
    halves = {"a": whole[:2], "b": whole[2:], "again": whole[2:]}  # side by side, and a tied one
    ops.noise_(halves, alpha=0.5, beta=0.0, seed=0)
    assert (whole == 0.5).all()


def test_the_names_of_wrappers_are_stripped():
    wanted = "model.layers.0.self_attn.q_proj.weight"
    for name in (
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "module._orig_mod.model.layers.0.self_attn._orig_mod.q_proj.weight",
        "_orig_mod.base_model.model.model.layers.0.self_attn.q_proj.base_layer.base_layer.weight",
        wanted,
    ):
        assert canonical_name(name) == wanted


@pytest.mark.parametrize(
    ("match", "wanted"),
    [
        ("layers:0,2", {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}),
        ("layers:1-2", {"layers.1.weight", "layers.1.bias", "layers.2.weight", "layers.2.bias"}),
        ("not layers:0-2", {"embed.weight", "experts", "conv.weight"}),
        ("not layers.*", {"embed.weight", "experts", "conv.weight"}),
        ("not vectors", {"embed.weight", "experts", "conv.weight"} | {f"layers.{i}.weight" for i in range(3)}),
    ],
)
def test_layers_by_number_and_all_but_these(match, wanted):
    before, after, _ = noised(Model(), rules=[NoiseRule("*", alpha=0.0), NoiseRule(match, alpha=0.5)])
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted


@pytest.mark.parametrize(
    ("rules", "argument"),
    [
        ([NoiseRule("layer.*")], r"rules\[0\].match: got 'layer.\*'"),
        (
            [NoiseRule("layers:1-3")],
            r"rules\[0\].match: got 'layers:1-3' with layer 3, wanted layers.*the last is 2",
        ),
        ([NoiseRule("not layers:7", alpha=0.0)], r"rules\[0\].match: got 'not layers:7' with layer 7"),
        ([NoiseRule("matrices", law="normal")], "std"),
        ([NoiseRule("vectors", law="xavier_uniform")], "law"),
        ([NoiseRule("vectors", law="normal", std=1.0, toward=1.0)], "law"),
        ([NoiseRule("*", toward=1.0)], "toward"),
        (["matrices"], "rules"),
    ],
)
def test_rules_that_cannot_be_followed_change_nothing(rules, argument):
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"^{argument}") as error:
        noise_(model, alpha=0.5, seed=1, toward=0.0, rules=rules)
    assert ", wanted " in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"match": ""},
        {"match": "layers:"},
        {"match": "layers:2-1"},
        {"match": "not layers:x"},
        {"alpha": 2.0},
        {"beta": -1.0},
        {"law": "cauchy"},
        {"std": -1.0},
        {"toward": math.inf},
    ],
)
def test_bad_rules_are_refused_when_they_are_made(bad):
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))}: got"):
        NoiseRule(**{"match": "*", **bad})
