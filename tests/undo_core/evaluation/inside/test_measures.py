"""Measures against definitions in float64 that share nothing with them, and by what must hold for any model."""

import copy
from pathlib import Path

import pytest
import torch
from two_models import text, two_models

from undo_core.data.sequences import Sequences
from undo_core.evaluation import inside
from undo_core.evaluation.inside import MEASUREMENTS, Texts
from undo_core.evaluation.inside.angle import Angle
from undo_core.evaluation.inside.cka import Cka
from undo_core.evaluation.inside.connectivity import Connectivity
from undo_core.evaluation.inside.distance import Distance
from undo_core.evaluation.inside.linear_probe import LinearProbe, ridge
from undo_core.evaluation.inside.logit_lens import LogitLens
from undo_core.evaluation.inside.patching import Patching
from undo_core.evaluation.inside.shift import Shift
from undo_core.evaluation.metrics import evaluate

FIT, SCORE = ({"forget": text(seed), "retain": text(seed + 1)} for seed in (20, 30))


def texts(reference=None):
    return Texts(FIT, SCORE, lambda: reference)


def outputs(model, sequences=SCORE["forget"]):
    """Returns transformers' own hidden states in float64 ``[tokens, d]``, after each layer but the last."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        found = wide(input_ids=sequences.input_ids.long(), use_cache=False, output_hidden_states=True).hidden_states
    return [hidden.flatten(0, 1) for hidden in found[1:-1]]


@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_a_kind_is_a_frozen_dataclass_in_a_file_that_is_found(kind):
    own = MEASUREMENTS[kind]
    assert own.__module__ == f"{inside.__name__}.{kind}" and own.__dataclass_params__.frozen
    assert own().value and own().passes(4) >= 0 and (Path(inside.__file__).parent / f"{kind}.py").is_file()


@pytest.mark.parametrize("kind", MEASUREMENTS)
def test_a_model_is_the_same_after_it_was_measured(kind):
    original, model = two_models()
    before = copy.deepcopy(model.state_dict()), copy.deepcopy(original.state_dict())
    loss = evaluate(model, SCORE["forget"])["value"]
    curve = MEASUREMENTS[kind]().curve(model, texts(original))
    for measured, kept in zip((model, original), before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in measured.state_dict().items())
    assert evaluate(model, SCORE["forget"])["value"] == loss and MEASUREMENTS[kind]().number(curve, False) is not None
    assert len(curve) >= 4 and [at for at, _ in curve] == sorted({at for at, _ in curve})


def test_cka_is_that_of_the_centred_activations():
    original, model = two_models()
    curve = Cka().curve(model, texts(original))
    for (at, value), x, y in zip(curve, outputs(model), outputs(original), strict=False):
        x, y = x - x.mean(0), y - y.mean(0)
        gram = (x @ x.T, y @ y.T)  # over tokens, not over dimensions as in the code
        wanted = (gram[0] * gram[1]).sum() / (gram[0].norm() * gram[1].norm())
        assert 0 < at < 4 and value == pytest.approx(float(wanted), rel=1e-5)
    assert [value for _, value in Cka().curve(model, texts(model))] == pytest.approx([1.0] * 4, abs=1e-12)


def test_cka_does_not_see_a_rotation_or_a_factor():
    original, _ = two_models()
    generator = torch.Generator().manual_seed(5)
    rotation = 3 * torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    turned = copy.deepcopy(original)
    last = turned.model.layers[-1]
    last.register_forward_hook(lambda module, args, output: output @ rotation + 0.7)
    (_, value), (_, before) = Cka().curve(turned, texts(original))[-1], Cka().curve(turned, texts(original))[0]
    assert value == pytest.approx(1.0, abs=1e-6) == before
    assert Angle().curve(turned, texts(original))[-1][1] < 0.99, "the angle sees the rotation"


def test_shift_and_angle_are_those_of_the_principal_directions():
    original, model = two_models()
    shifts, angles = (kind.curve(model, texts(original)) for kind in (Shift(), Angle()))
    for index, (x, y) in enumerate(zip(outputs(model), outputs(original), strict=True)):
        first = torch.linalg.svd(y - y.mean(0), full_matrices=False)
        own = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[0]
        deviation = first.S[0] / len(y) ** 0.5
        assert shifts[index][1] == pytest.approx(float(((x.mean(0) - y.mean(0)) @ first.Vh[0]).abs() / deviation), rel=1e-4)
        assert angles[index][1] == pytest.approx(float((own @ first.Vh[0]).abs()), rel=1e-4)
    assert [value for _, value in Shift().curve(model, texts(model))] == [0.0] * 4


@pytest.mark.parametrize("kind", [Angle, Shift, Cka])
def test_outputs_that_do_not_vary_have_no_direction(kind):
    original, _ = two_models()
    still = copy.deepcopy(original)
    with torch.no_grad():
        still.model.embed_tokens.weight.zero_()
    assert {value for _, value in kind().curve(original, texts(still))} == {None}


@pytest.mark.parametrize("kind", [Angle, Shift, Distance, Connectivity, Patching])
def test_models_of_other_widths_are_refused_under_the_name_of_the_setting(kind):
    (_, model), (wider, _) = two_models(), two_models(hidden_size=32)
    with pytest.raises(ValueError, match=r"^against: got .*16"):
        kind().curve(model, texts(wider))


def test_distance_is_relative_to_the_other_model():
    original, model = two_models()
    curve = dict(Distance().curve(model, texts(original)))
    states = model.state_dict(), original.state_dict()
    for at in range(5):
        names = [
            name for name in dict(model.named_parameters()) if (f"layers.{at - 1}." in name if at else "layers." not in name)
        ]
        own, other = (torch.cat([state[name].double().flatten() for name in names]) for state in states)
        assert curve[at] == pytest.approx(float((own - other).norm() / other.norm()), rel=1e-9)
    assert set(curve) == {0, 1, 2, 3, 4}
    assert {value for _, value in Distance().curve(model, texts(model))} == {0.0}


def test_the_line_ends_at_both_models_and_the_barrier_is_the_worst_point():
    original, model = two_models()
    curve = Connectivity(text="retain").curve(model, texts(original))
    ends = [evaluate(each, SCORE["retain"])["value"] for each in (model, original)]
    assert [at for at, _ in curve] == [0.0, 0.25, 0.5, 0.75, 1.0] and [curve[0][1], curve[-1][1]] == ends
    points = [(0.0, 1.0), (0.5, 4.0), (1.0, 3.0)]
    assert Connectivity().number(points, higher=False) == 2.0 and Connectivity().number(points, higher=True) == 0.0
    assert Connectivity().number([(0.0, 0.9), (0.5, 0.2), (1.0, 0.7)], higher=True) == pytest.approx(0.6)


def test_the_lens_reads_each_layer_with_the_models_own_norm_and_head():
    _, model = two_models()
    curve = LogitLens().curve(model, texts())
    wide, labels = copy.deepcopy(model).double(), SCORE["forget"].input_ids.long()[:, 1:]
    for (_, value), hidden in zip(curve, outputs(model), strict=False):
        with torch.no_grad():
            logits = wide.lm_head(wide.model.norm(hidden)).view(24, 12, -1)[:, :-1]
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert value == pytest.approx(float(wanted), rel=1e-5)
    assert curve[-1] == (4, evaluate(model, SCORE["forget"])["value"])
    assert LogitLens().number([(1, 3.0), (2, 2.0), (3, 1.0)], higher=False) == 2.0


def test_patching_a_layer_that_agrees_gives_all_of_the_other_model():
    original, model = two_models()
    mixed = copy.deepcopy(original)
    mixed.model.layers[2].load_state_dict(model.model.layers[2].state_dict())
    with torch.no_grad():
        mixed.model.layers[2].mlp.down_proj.weight.mul_(3)
    curve = Patching().curve(mixed, texts(original))
    assert [value for _, value in curve[:2]] == [1.0, 1.0], "the layers before the changed one"
    assert [value for _, value in curve[2:]] == [0.0, 0.0], "from it on the other model sees what the model does"
    same = Patching().curve(copy.deepcopy(original), texts(original))
    assert {value for _, value in same} == {None} and Patching().number(same, False) is None


def test_a_ridge_is_the_minimum_of_its_loss_and_separates_what_can_be():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 10, 0.1, 1, 1]) + 3
    y = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    predicted = ridge(x, y, 0.3)(x)
    scaled = (x - x.mean(0)) / x.std(0, unbiased=False)
    rows = torch.cat([scaled, torch.eye(5, dtype=torch.float64) * (0.3 * 40) ** 0.5])  # the penalty as further examples
    weights = torch.linalg.lstsq(rows, torch.cat([y - y.mean(0), torch.zeros(5, 2, dtype=torch.float64)])).solution
    torch.testing.assert_close(predicted, scaled @ weights + y.mean(0))


def test_a_probe_reads_what_a_layer_holds_and_not_what_it_lacks():
    """Layers that add nothing output the embeddings, which tell the next token of a cycle; one drawn at random is nowhere."""
    _, model = two_models()
    ids = torch.arange(2, 12).repeat(3)
    cycle = torch.stack([ids[start : start + 12] for start in range(10)]).int()
    known = {"forget": Sequences(cycle, 0)}
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
    curve = LinearProbe().curve(plain, Texts(known, known, lambda: None))
    assert curve == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)] and LinearProbe().number(curve, True) == 1.0
    random = LinearProbe(sequences=24).curve(model, texts())
    assert max(value for _, value in random) < 0.35, "ten equally likely tokens"
    answers = torch.zeros(10, 12, dtype=torch.bool)
    answers[:, 6] = True
    only = {"forget": Sequences(cycle, 0, answers)}
    assert LinearProbe().curve(plain, Texts(only, only, lambda: None))[0][1] == 1.0
    first = LinearProbe(tokens=11).curve(plain, Texts(known, known, lambda: None))
    assert first[0][1] == 1.0, "the first sequence has all tokens but one"
    few = LinearProbe(classes=2).curve(plain, Texts(known, known, lambda: None))
    assert few[0][1] == pytest.approx(0.2), "two of ten tokens, all equally frequent, are told apart"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cka(text="both"), "text: got 'both', wanted forget or retain"),
        (lambda: Cka(sequences=1), "sequences: got 1, wanted an integer >= 2"),
        (lambda: LinearProbe(against="filter"), "against: got filter with kind linear_probe, which compares with no model"),
        (lambda: LinearProbe(classes=1), "classes: got 1, wanted an integer >= 2"),
        (lambda: Connectivity(alphas=[0.0, 1.0]), "alphas: got .0.0, 1.0., wanted increasing numbers from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
