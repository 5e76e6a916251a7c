"""Trials of an attack that train as one batched run: the same gradients and curves as one by one, with fewer launches."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from causal_models import build
from launches import Launches
from tiny_run import RUN
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import cli
from undo_core.attacks import AttackConfig
from undo_core.attacks.relearning import attack_together, mixed_cross_entropy, relearn
from undo_core.data.sequences import Sequences
from undo_core.pipeline.attack_config import AttackRunConfig, TextConfig
from undo_core.pipeline.attack_run import defences_of
from undo_core.pipeline.stage import Folder
from undo_core.pipeline.stages.grid import Grid
from undo_core.training import train
from undo_core.training.batches import as_batch
from undo_core.training.together import Together


def copies_of(model, number):
    """Copies of ``model`` whose weights differ."""
    copies = [copy.deepcopy(model) for _ in range(number)]
    with torch.no_grad():
        for index, own in enumerate(copies):
            generator = torch.Generator().manual_seed(index)
            for parameter in own.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return copies


def batches_for(number, vocabulary=60):
    """For each model a batch of forget and one of retain text; some of the tokens are 0, which is padding to the models."""
    generator = torch.Generator().manual_seed(7)
    ids = lambda *shape: as_batch(torch.randint(0, vocabulary, shape, generator=generator))  # noqa: E731
    return [{"forget": ids(4, 9), "retain": ids(2, 7)} for _ in range(number)]


def counted_in(batches):
    return [{name: batch.counted for name, batch in own.items()} for own in batches]


@pytest.mark.parametrize("name", ["gemma2", "llama", "gpt_neox", "qwen3"])
def test_gradients_are_those_of_each_model_alone(name):
    models = copies_of(build(name).double(), 3)
    frozen = next(iter(models[0].named_parameters()))[0] if name == "llama" else None
    for model in models:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name != frozen)
        model.set_attn_implementation(
            "eager"
        )  # what runs together on a CPU; it computes its softmax in float32, sdpa in float64
    alone, batches = copy.deepcopy(models), batches_for(3)
    counted = counted_in(batches)
    losses = Together(models).gradients(batches, counted)
    assert len(losses) == 3
    for model, other, own, counts, loss in zip(alone, models, batches, counted, losses, strict=True):
        wanted = mixed_cross_entropy(model, own, counts)
        wanted.backward()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        for (parameter_name, parameter), found in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (parameter.grad is None) == (found.grad is None), parameter_name
            if parameter.grad is not None:
                torch.testing.assert_close(found.grad, parameter.grad, rtol=1e-9, atol=1e-13, msg=parameter_name)


def test_one_launch_serves_all_copies():
    models = copies_of(build("gemma2"), 10)
    batches = batches_for(10)
    counted = counted_in(batches)
    together = Together(models)
    together.gradients(batches, counted)
    with Launches() as batched:
        together.gradients(batches, counted)
    with Launches() as single:
        for model, own, counts in zip(models, batches, counted, strict=True):
            mixed_cross_entropy(model, own, counts).backward()
    assert single.count > 4 * batched.count, (single.count, batched.count)


def small_model():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=32, max_position_embeddings=32, **shape))


def text(seed):
    generator = torch.Generator().manual_seed(seed)
    return Sequences(torch.randint(1, 32, (16, 8), generator=generator, dtype=torch.int32), 0)


def test_curves_are_those_of_trials_one_by_one():
    model, forget, retain = small_model(), text(0), text(1)
    config = AttackConfig(
        rates=[1e-2, 3e-2], seeds=2, evaluate_at=[0, 2, 6], headline_step=6, extend=1, batch_size=4, mix={"forget": 3, "retain": 1}
    )  # fmt: skip
    asked = []

    def evaluate(model):
        asked.append(model)
        batch = as_batch(forget.input_ids.long())
        return {"forget": float(mixed_cross_entropy(model, {"forget": batch}, {"forget": batch.counted}))}

    given = {"retain": retain, "evaluate": evaluate, "higher_is_better": False, "progress": False}
    alone = relearn(model, forget, config, **given)
    evaluated_alone = len(asked)
    before = [parameter.clone() for parameter in model.parameters()]
    together = relearn(model, forget, dataclasses.replace(config, together=3), **given)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert list(together) == list(alone) and len(alone) in (4, 6)
    assert len(asked) < 2 * evaluated_alone, "the evaluation before the first step is the same for all trials of a group"
    finals = set()
    for trial, result in alone.items():
        other = together[trial]
        assert (other.steps, other.tokens, other.positions) == (result.steps, result.tokens, result.positions)
        for point, found in zip(result.history, other.history, strict=True):
            assert found == pytest.approx(point, rel=2e-4)
        finals.add(round(result.history[-1]["forget"], 3))
    assert len(finals) == len(alone), "the trials differ, so that a mix-up of copies would show"


@pytest.mark.parametrize(("precision", "optimizer"), [("bfloat16", "sgd"), ("bfloat16-stochastic", "adamw")])
def test_evaluations_see_each_model_as_alone_and_one_that_diverges_spoils_no_other(precision, optimizer):
    model, forget, seen = small_model().train(), text(0), []
    kernel = model.config._attn_implementation
    config = AttackConfig(
        rates=[1e-2, 1e18], evaluate_at=[0, 3], headline_step=3, extend=0, batch_size=4, precision=precision, optimizer=optimizer,
        clip=0.0, attention="eager",
    )  # fmt: skip

    def evaluate(model):
        dtype = next(model.parameters()).dtype
        seen.append((model.training, torch.is_grad_enabled(), dtype, model.config._attn_implementation))
        batch = as_batch(forget.input_ids.long())
        return {"forget": float(mixed_cross_entropy(model, {"forget": batch}, {"forget": batch.counted}).detach())}

    alone = relearn(model, forget, config, evaluate=evaluate, higher_is_better=False, progress=False)
    together = attack_together(
        model, forget, config.trials(), dataclasses.replace(config, together=2), evaluate=evaluate, progress=False
    )
    assert set(seen) == {(False, False, torch.bfloat16, "eager")} and kernel != "eager"
    finals = []
    for trial, result in alone.items():
        copied, other = together[trial]
        assert copied.config._attn_implementation == kernel
        assert other.history[0] == result.history[0]
        finals.append((result.history[-1]["forget"], other.history[-1]["forget"]))
    assert (
        finals[0][1] == pytest.approx(finals[0][0], rel=2e-3) and finals[0][0] < alone[config.trials()[0]].history[0]["forget"]
    )
    assert not any(value < 10 for value in finals[1]), "the other one has diverged"


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "lora"},
        {"precision": "bfloat16-master"},
        {"step_in_backward": True},
        {"micro_batch_size": 2},
        {"activation_checkpointing": True},
        {"optimizer": "adamw-offload"},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    (name,) = settings
    AttackConfig(**settings)
    with pytest.raises(ValueError, match=f"^together: got 2 with {name}: "):
        AttackConfig(together=2, **settings)


def test_the_attacks_of_undo_attack_take_it_where_they_can(tmp_path):
    for name in ("keep", "forget"):
        (tmp_path / f"{name}.txt").write_text("a text\n")
    data = TextConfig(retain=[str(tmp_path / "keep.txt")], forget=[str(tmp_path / "forget.txt")])
    config = AttackRunConfig(output="out", data=data, relearn=AttackConfig(together=4))
    assert {name: own.together for name, own in config.envelope().items()} == {
        "quantised": 1, "mixed": 4, "benign": 4, "adapters": 1
    }  # fmt: skip
    build("llama").save_pretrained(tmp_path / "model")
    for keep in (False, True):
        (defence,) = defences_of([str(tmp_path / "model")], dataclasses.replace(config, keep=keep))
        grids = {stage.inputs["grid"].key: stage.inputs["grid"] for stage in defence.stages() if "grid" in stage.inputs}
        assert len(grids) == 3 and all(len(grid.trials) == 4 for grid in grids.values())
        assert {grid.config.save for grid in grids.values()} == {keep}, "weights that would be removed are not written"


def test_models_and_batches_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"^models: got dropout"):
        Together(copies_of(build("gpt2"), 2))
    with pytest.raises(ValueError, match="differ in name, shape"):
        Together([build("llama"), build("qwen3")])
    models = copies_of(small_model(), 2)
    with pytest.raises(ValueError, match=r"^forget: got batches of different shapes.*together: 1"):
        Together(models).gradients(
            [{"forget": as_batch(torch.ones(2, length, dtype=torch.long))} for length in (4, 5)], [{"forget": 6}] * 2
        )
    with pytest.raises(ValueError, match=r"Bloom.*torch.func.vmap cannot run.*together: 1"):
        bloom = build("bloom")
        for module in bloom.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        bloom.config.attention_dropout = 0.0
        batches = batches_for(2)
        Together(copies_of(bloom, 2)).gradients(batches, counted_in(batches))


def test_an_error_in_a_step_leaves_the_contexts_of_the_training():
    model = small_model()
    kernel, config = model.config._attn_implementation, AttackConfig(attention="eager", activation_checkpointing=True)

    def broken(model, *arguments):
        assert model.config._attn_implementation == "eager" != kernel and model.is_gradient_checkpointing
        raise KeyError("broken")

    source = {"forget": lambda step: as_batch(torch.ones(1, 4, dtype=torch.long))}
    with pytest.raises(KeyError, match="broken"):
        train(model, mixed_cross_entropy, source, config.training(1e-3), gradient=broken, progress=False)
    assert model.config._attn_implementation == kernel and not model.is_gradient_checkpointing


def test_trials_whose_rates_agree_in_six_digits_keep_their_own_results():
    config = AttackConfig(rates=[1.2345671e-3, 1.2345674e-3], together=2, seed=0)
    given = {"prepared": Folder(Path("data")), "model": Folder(Path("model"))}
    grid = Grid(config=config, trials=tuple(config.trials()), **given)
    assert len({grid.trial(trial).trial_name for trial in grid.trials}) == 2


def test_a_run_takes_the_trials_from_one_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = {**RUN, "relearn": {**RUN["relearn"], "rates": [1e-3, 2e-3, 3e-3], "extend": 0}}
    curves = {}
    for together in (1, 3):
        (tmp_path / "run.json").write_text(json.dumps({**settings, "relearn": {**settings["relearn"], "together": together}}))
        assert cli.main(["plan", "run.json"]) in (0, None)
        assert cli.main(["run", "run.json"]) in (0, None)
        results = json.loads((tmp_path / "out" / "results-seed0.json").read_text())
        curves[together] = {entry["name"]: entry["attack"]["curves"] for entry in results["models"] if entry.get("attack")}
    grids = sorted((tmp_path / "out" / "stages").glob("grid-*"))
    assert len(grids) == len(curves[3]) >= 2, "one batched run for each attacked model"
    for name, found in curves[3].items():
        for one, other in zip(curves[1][name], found, strict=True):
            assert one["rate"] == other["rate"] and one["stage"] != other["stage"]
            folder = tmp_path / "out" / "stages" / other["stage"]
            AutoModelForCausalLM.from_pretrained(folder)
            facts = json.loads((folder / "manifest.json").read_text())
            alone = json.loads((tmp_path / "out" / "stages" / one["stage"] / "manifest.json").read_text())
            assert (facts["steps"], facts["tokens"], facts["flops"]) == (alone["steps"], alone["tokens"], alone["flops"])
            assert facts["inputs"]["grid"]["folder"] in {grid.name for grid in grids}
    assert "3 at once" in capsys.readouterr().out
