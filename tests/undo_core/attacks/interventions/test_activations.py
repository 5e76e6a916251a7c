"""Interventions in activations and in the input, against transformers' own hidden states and by what must not change."""

import copy
import dataclasses

import pytest
import torch
from two_models import text, two_models

from undo_core.attacks.interventions import Given, intervened
from undo_core.attacks.interventions.latent import Latent
from undo_core.attacks.interventions.patch import Patch
from undo_core.attacks.interventions.restore import Restore
from undo_core.attacks.interventions.soft_prompt import SoftPrompt, prefixed
from undo_core.attacks.interventions.steer import Steer
from undo_core.data.sequences import Sequences
from undo_core.evaluation.metrics import evaluate
from undo_core.models import hidden_states

FORGET, RETAIN, TEST = text(10), text(11), text(12)


def given(original=None):
    return Given(FORGET, RETAIN, lambda: original, seed=3)


def layer_outputs(model, sequences, index):
    """Returns transformers' own outputs of a layer before the last, in float64."""
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        found = wide(input_ids=sequences.input_ids.long(), use_cache=False, output_hidden_states=True).hidden_states
    return found[index + 1]


def contrast(model, index):
    return layer_outputs(model, FORGET, index).mean((0, 1)) - layer_outputs(model, RETAIN, index).mean((0, 1))


def under(model, attack, original=None):
    """Returns the loss on the test text, and the outputs of each layer, under an attack.

    transformers keeps hidden states by hooks that it adds once; a copy gets them after those of the attack.
    """
    model = copy.deepcopy(model)
    with intervened(model, attack, given(original)) as score:
        loss = score(model, TEST)["value"]
        with torch.no_grad():
            ids = TEST.input_ids.long()
            outputs = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    return loss, outputs


@pytest.mark.parametrize("way", ["add", "remove"])
def test_steering_moves_one_layer_along_the_difference_of_means(way):
    _, model = two_models()
    vector = contrast(model, 1)
    before = layer_outputs(model, TEST, 1)
    loss, outputs = under(model, Steer(depths=[0.5], ways=[way], strengths=[1.5]))
    unit = vector / vector.norm()
    wanted = before + 1.5 * vector if way == "add" else before - 1.5 * (before @ unit)[..., None] * unit
    torch.testing.assert_close(outputs[2].double(), wanted, rtol=1e-4, atol=1e-5)
    assert loss != evaluate(model, TEST)["value"]
    if way == "remove":
        _, removed = under(model, Steer(depths=[0.5], ways=[way], strengths=[1.0]))
        assert (removed[2].double() @ unit).abs().max() < 1e-4 < (before @ unit).abs().max()


def test_restoring_adds_the_difference_of_both_models():
    original, model = two_models()
    shift = contrast(original, 1) - contrast(model, 1)
    _, outputs = under(model, Restore(depths=[0.5], strengths=[2.0]), original)
    torch.testing.assert_close(outputs[2].double(), layer_outputs(model, TEST, 1) + 2 * shift, rtol=1e-4, atol=1e-5)


def test_at_strength_zero_and_once_removed_nothing_changes():
    original, model = two_models()
    before = evaluate(model, TEST)["value"]
    weights = copy.deepcopy(model.state_dict())
    required = [parameter.requires_grad for parameter in model.parameters()]
    attacks = [Steer(depths=[1.0], ways=[way], strengths=[0.0]) for way in ("add", "remove")]
    attacks += [Restore(depths=[0.5], strengths=[0.0]), Latent(depths=[0.5], radii=[0.0], steps=2, batch_size=4)]
    for attack in attacks:
        assert under(model, attack, original)[0] == before, attack
    changing = [Steer(depths=[0.5], ways=["add"], strengths=[1.0]), Restore(depths=[0.5], strengths=[1.0]), Patch(depths=[0.5])]
    changing += [Latent(depths=[0.5], radii=[1.0], steps=2, batch_size=4)]
    changing += [SoftPrompt(tokens=[2], rates=[0.3], steps=2, batch_size=4)]
    for attack in changing:
        with intervened(model, attack, given(original)) as score:
            assert score(model, TEST)["value"] != before, attack
        assert evaluate(model, TEST)["value"] == before, attack
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == required


def test_a_patch_of_the_only_layers_that_differ_gives_the_original():
    original, model = two_models()
    wanted = evaluate(original, TEST)["value"]
    mixed = copy.deepcopy(original)
    mixed.model.layers[1].load_state_dict(model.model.layers[1].state_dict())
    assert evaluate(mixed, TEST)["value"] != wanted
    for depth, equal in ((0.25, False), (0.5, True), (0.75, True), (1.0, True)):
        assert (under(mixed, Patch(depths=[depth]), original)[0] == wanted) is equal, depth
    _, shallow = two_models(num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"^original: got models of 2 layers of width 16 and of 4 layers of width 16, wanted"):
        under(model, Patch(depths=[0.5]), shallow)


def test_a_latent_vector_stays_in_its_ball_and_lowers_the_loss():
    _, model = two_models()
    before = layer_outputs(model, FORGET, 1)
    loss = {}
    for radius in (0.1, 0.5):
        attack = Latent(depths=[0.5], radii=[radius], steps=12, batch_size=12)
        copied = copy.deepcopy(model)
        with intervened(copied, attack, given()) as score:
            loss[radius] = score(copied, FORGET)["value"]
            with torch.no_grad():
                ids = FORGET.input_ids.long()
                after = copied(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[2]
        moved = (after.double() - before).norm(dim=-1)
        largest = radius * float(before.norm(dim=-1).mean())
        assert moved.max() <= largest * 1.0001 and moved.min() >= 0.5 * largest, "all tokens move by one vector"
    assert loss[0.5] < loss[0.1] < evaluate(model, FORGET)["value"]


@pytest.mark.parametrize("answered", [False, True])
def test_a_prompt_of_known_embeddings_is_those_tokens(answered):
    """With embeddings of real tokens, an untrained soft prompt scores what the tokens in front of the text score."""
    _, model = two_models()
    sequences = TEST
    if answered:
        mask = torch.zeros_like(TEST.input_ids, dtype=torch.bool)
        mask[:, -1] = True
        best = model(input_ids=TEST.input_ids.long(), use_cache=False).logits[:, -2].argmax(1)
        ids = TEST.input_ids.clone()
        ids[::2, -1] = best[::2].int()
        sequences = Sequences(ids, 0, mask)
    attack = SoftPrompt(tokens=[3], rates=[1e-30], steps=1, batch_size=4)
    known = FORGET.input_ids.unique()
    tokens = known[torch.randint(len(known), (3,), generator=torch.Generator().manual_seed(3))]
    longer, counted = prefixed(sequences, 3)
    real = dataclasses.replace(longer, input_ids=torch.cat([tokens.expand(24, 3), sequences.input_ids], 1))
    assert counted.sum() == 24 * 11 and longer.length == 15
    wanted = evaluate(model, real, counted=counted)
    with intervened(model, attack, given()) as score:
        got = score(model, sequences)
    assert got["n"] == 24 and got["value"] == pytest.approx(wanted["value"], rel=1e-6)


def test_a_soft_prompt_lowers_the_loss_of_the_text_it_is_trained_on():
    _, model = two_models()
    with intervened(model, SoftPrompt(tokens=[8], rates=[0.3], steps=12, batch_size=12), given()) as score:
        assert score(model, FORGET)["value"] < evaluate(model, FORGET)["value"]
    with pytest.raises(
        ValueError, match=r"^tokens: got 60 before sequences of 12 tokens, which need 71 positions; wanted at most"
    ):
        SoftPrompt(tokens=[60], rates=[0.3]).apply(model, given())
    assert hidden_states(model, FORGET.input_ids.long()).shape == (24, 12, 16), "no hook is left"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steer(ways=["push"]), "ways: got .'push'., wanted different ones of remove, add"),
        (lambda: Steer(depths=[0.0]), "depths: got .0.0., wanted different numbers above 0 to 1"),
        (lambda: Steer(sequences=0), "sequences: got 0, wanted an integer >= 1"),
        (lambda: Latent(radii=[-1.0]), "radii: got .-1.0., wanted different numbers from 0"),
        (lambda: SoftPrompt(steps=0), "steps: got 0, wanted an integer >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
