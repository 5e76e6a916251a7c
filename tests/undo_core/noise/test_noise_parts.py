"""The damage affects the text part of a model by default, and all of it on request; reports and commands list the rest."""

import shutil
from pathlib import Path

import causal_models
import pytest
import torch
from safetensors.torch import load_file
from stage_kinds import NOWHERE
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from undo_core import NoiseRule, damage_, noise_
from undo_core.cli import main
from undo_core.io.files import read_json
from undo_core.noise.checkpoint import noise_checkpoint
from undo_core.noise.config import NoiseConfig
from undo_core.noise.parameters import Left, summary
from undo_core.pipeline.stages import Damage, Noise

ROOT = Path(__file__).parents[3]
TOWER = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
TEXT = "model.language_model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma3")
    causal_models.build("gemma3").save_pretrained(folder)
    return folder


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def noised(**options):
    model = causal_models.build("gemma3")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = noise_(model, alpha=0.5, seed=3, **options)
    return report, changed(before, {name: p.detach() for name, p in model.named_parameters()})


def test_all_parts_by_name():
    text, moved = noised()
    everything, moved_too = noised(parts="all")
    assert TEXT in moved and TOWER not in moved and text.left[TOWER].reason == "not text"
    assert TOWER in moved_too and not everything.left and set(everything) == set(text) | set(text.left)
    assert all(everything[name] == text[name] for name in text), "the text's noise is the same"
    assert everything[TOWER].noise > 0 and everything["model.multi_modal_projector.mm_soft_emb_norm.weight"].noise == 0
    damaged = damage_(causal_models.build("gemma3"), "prune", strength=0.5, seed=0, parts="all")
    assert TOWER in damaged and TOWER not in damage_(causal_models.build("gemma3"), "prune", strength=0.5, seed=0)


def test_rules_about_what_is_left():
    _, moved = noised(rules=[NoiseRule("*vision_tower*", alpha=0.0), NoiseRule("embeddings", alpha=0.0)])
    assert TOWER not in moved and TEXT in moved and "model.language_model.embed_tokens.weight" not in moved
    with pytest.raises(ValueError, match=r"^rules\[0\].match: got '\*vision\*', and .* is left: not text, wanted parts='all'"):
        noised(rules=[NoiseRule("*vision*", alpha=0.3)])
    _, moved = noised(parts="all", rules=[NoiseRule("*", alpha=0.0), NoiseRule("*fc1.weight", alpha=0.3)])
    assert TOWER in moved and TEXT not in moved
    for bad in (lambda: noised(parts="vision"), lambda: NoiseConfig(parts="vision")):
        with pytest.raises(ValueError, match=r"parts: got 'vision', wanted one of text, all"):
            bad()


def test_what_was_left_is_summed_by_reason():
    left = {"a": Left("frozen", 10, 0.01), "b": Left("not text", 300, 0.3), "c": Left("not text", 1200, 0.2)}
    assert summary(left) == (
        "1 parameters (10 elements, 1.0% of the model): frozen; 2 parameters (1,500 elements, 50.0% of the model): not text"
    )
    assert summary({}) == ""


def test_a_vector_without_an_initial_value_is_left_unless_a_rule_gives_one():
    class Valued(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = causal_models.build("llama")
            self.value = torch.nn.Linear(16, 1)

    report = noise_(Valued(), alpha=0.5, seed=1)
    assert {name: left.reason for name, left in report.left.items()} == {"value.bias": "no initial value"}
    assert "value.weight" in report and "model.model.norm.weight" in report
    model = Valued()
    with torch.no_grad():
        model.value.bias.fill_(2.0)
        model.model.model.norm.weight.fill_(3.0)
    report = noise_(model, alpha=0.5, seed=1, rules=[NoiseRule("value.bias", toward=1.0)])
    assert not report.left and model.value.bias.item() == 1.5
    assert (model.model.model.norm.weight == 2.0).all(), "the wrapped model's own initial values hold"


def test_what_wraps_a_model_does_not_change_its_bits():
    model = causal_models.build("qwen3_next")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = noise_(model, alpha=0.5, seed=1)
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert changed(before, bits)
    model.load_state_dict(before, strict=False)
    torch.set_default_dtype(torch.bfloat16)  # the caller's defaults do not matter
    state = torch.get_rng_state()
    try:
        assert noise_(torch.compile(model), alpha=0.5, seed=1) == wanted
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert not changed(bits, {name: p.detach() for name, p in model.named_parameters()})


def test_the_commands_say_what_was_left(checkpoint, tmp_path, capsys):
    before = load_file(checkpoint / "model.safetensors")
    for parts, command in (("text", "noise"), ("all", "noise"), ("text", "damage"), ("all", "damage")):
        folder = tmp_path / f"{command}-{parts}"
        more = ["prune", "--alpha=0.5"] if command == "damage" else ["--alpha=0.5"]
        assert main([command, str(checkpoint), str(folder), *more, f"--parts={parts}"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        moved = changed(before, load_file(folder / "model.safetensors"))
        left = read_json(folder / "manifest.json")["left"]
        assert any("vision_tower" in name for name in moved) == (parts == "all")
        assert any("language_model" in name for name in moved)
        if parts == "text":
            assert set(left[TOWER]) == {"reason", "elements", "share"}
            count, elements = len(left), sum(one["elements"] for one in left.values())
            assert f"left as they were: {count} parameters ({elements:,} elements" in printed
        else:
            assert not left and "left as they were" not in printed


def test_the_results_of_a_run_say_what_was_left():
    facts = {"left": {TOWER: {"reason": "not text", "elements": 300, "share": 0.25}}}
    measured = {"strength": 0.1, "distance": 0.2, "wanted": 0.2}
    noised = Noise(alpha=0.5, beta=0.1, law="normal", seed=0, model=NOWHERE)
    pruned = Damage(operator="prune", seed=0, layers=None, strength=0.1, model=NOWHERE)
    left = {"left": "1 parameters (300 elements, 25.0% of the model): not text"}
    assert noised.results(facts) == left and noised.results({"left": {}}) == {}
    assert pruned.results({**facts, **measured}) == {"damage": {"operator": "prune", **measured}, **left}


def test_what_is_left_is_copied_bit_for_bit(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    report = noise_checkpoint(checkpoint, tmp_path / "out", alpha=1.0, beta=0.0, seed=0, progress=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "out"))
    moved = changed(before, after)
    assert moved and not any(name in report.left for name in moved) and len(report.left) == 50


def test_a_class_that_needs_more_than_a_configuration_is_refused_by_name():
    class Custom(type(causal_models.build("llama"))):
        def __init__(self, config, tokens):
            super().__init__(config)

    model = Custom(causal_models.config_of("llama"), 3)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"^model: got Custom, which cannot be built .*'tokens'.*; wanted a class that can"):
        noise_(model, alpha=0.5, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_folder_is_kept_for_the_same_configuration_and_tokenizer_alone(checkpoint, tmp_path, capsys):
    source, output = shutil.copytree(checkpoint, tmp_path / "source"), tmp_path / "output"
    command = ["noise", str(source), str(output), "--alpha=0.5"]
    for _ in range(2):
        assert main(command) == 0
    assert "already there" in capsys.readouterr().out
    for name, old, new in (("config.json", '"vocab_size"', '"other": 1, "vocab_size"'), ("tokenizer.json", "", "{}")):
        path = source / name
        before = path.read_bytes() if path.exists() else None
        path.write_text(new if before is None else before.decode().replace(old, new, 1))
        assert main(command) == 2 and "was made from other inputs" in capsys.readouterr().err
        path.unlink() if before is None else path.write_bytes(before)
    (source / "notes.json").write_text("{}")
    assert main(command) == 0, "a file that decides nothing"


def test_a_model_whose_configuration_nests_the_texts_is_planned(checkpoint, tmp_path, capsys):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    words = {f"w{i}": i for i in range(20)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="w1", eos_token="w2", unk_token="w0").save_pretrained(source)
    (tmp_path / "text.txt").write_text("w3 w4\n" * 8)
    data = [f"--data.{name}=[{tmp_path / 'text.txt'}]" for name in ("retain", "forget")]
    small = [f"--{stage}.train.batch_size=2" for stage in ("unlearn", "distill")]
    assert (
        main(["plan", str(ROOT / "configs/hf-template.yaml"), f"--model.path={source}", "--data.length=8", *data, *small]) == 0
    )
    assert "two real steps of this model" in " ".join(capsys.readouterr().out.split())
