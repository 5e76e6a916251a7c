"""Noise from disk to disk gives the bits of noise in memory, for every way in which transformers stores a model."""

import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import undo_kernels
from rounding import assert_rounded
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import noise_, ops
from undo_core.cli import main
from undo_core.noise import checkpoint as noise_checkpoint_module
from undo_core.noise.checkpoint import noise_checkpoint

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 1, "moe_intermediate_size": 16}
MODELS = {
    "gemma2": {"num_key_value_heads": 1, "head_dim": 8},  # tied
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0},  # Conv1D, biases
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},  # experts are stacked on load
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_key_value_heads": 2, "head_dim": 8},  # biases of two dimensions
}
OPTIONS = {"alpha": 0.5, "beta": 0.7, "seed": 3}


def model_of(kind, dtype=torch.float32, **extra):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **MODELS[kind], **extra), dtype=dtype)


def folders(tmp_path, model, size="20KB"):
    source, output = tmp_path / "source", tmp_path / "output"
    model.save_pretrained(source, max_shard_size=size)
    output.mkdir()
    return source, output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_bits_of_the_model_in_memory(tmp_path, kind, dtype):
    source, output = folders(tmp_path, model_of(kind, dtype))
    found = noise_checkpoint(source, output, **OPTIONS, progress=False)
    here = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    wanted = noise_(here, **OPTIONS)
    there = AutoModelForCausalLM.from_pretrained(output, dtype=dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    for (name, p), (_, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert found == wanted
    assert (output / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_unstacked_tensors_are_on_disk_as_before(tmp_path):
    source, output = folders(tmp_path, model_of("mixtral"))
    noise_checkpoint(source, output, **OPTIONS, progress=False)
    assert any(".experts.1." in name for path in source.glob("*.safetensors") for name in load_file(path))
    for path in source.glob("*.safetensors"):
        before, after = load_file(path), load_file(output / path.name)
        assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
        assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)


def test_buffers_and_other_files_stay(tmp_path):
    source, output = folders(tmp_path, model_of("llama"), "1GB")
    (source / "tokenizer.model").write_bytes(b"tokens")
    (source / "manifest.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.safetensors"):
        (source / name).write_bytes(b"the undamaged weights once more")
    noise_checkpoint(source, output, **OPTIONS, progress=False)
    assert (output / "tokenizer.model").read_bytes() == b"tokens" and not (output / "manifest.json").exists()
    assert not list(output.glob("*.bin")) and [path.name for path in output.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state | {"stranger": torch.ones(3, 3)}, "stranger"),
        (lambda state: {n: t for n, t in state.items() if "layers.1.mlp.up_proj" not in n}, "layers.1.mlp.up_proj"),
        (lambda state: {n: t.to(torch.int8) if "q_proj" in n else t for n, t in state.items()}, "q_proj"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(tmp_path, spoil, message):
    source, output = folders(tmp_path, model_of("llama"), "1GB")
    save_file(spoil(load_file(source / "model.safetensors")), source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^model: got .*{message}.*, wanted|^model: got .*{message}.*; wanted"):
        noise_checkpoint(source, output, **OPTIONS, progress=False)
    assert not list(output.iterdir())


def test_memory_is_bounded_by_a_tensor(tmp_path):
    """A file of 64 MiB has two matrices of 32 MiB; the process may grow by one of them and some slack."""
    config = AutoConfig.for_model("llama", **{**SMALL, "vocab_size": 131072, "hidden_size": 64, "num_hidden_layers": 1})
    source, output = tmp_path / "source", tmp_path / "output"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    program = f"""
import resource, shutil
from pathlib import Path
from undo_core.noise.checkpoint import noise_checkpoint
from undo_core.io.memory_use import peak_bytes, reset_peak
source, output = Path({str(source)!r}), Path({str(output)!r})
output.mkdir()
small = dict(alpha=.5, seed=1, progress=False)
noise_checkpoint(source, output, **small)  # loads every library
shutil.rmtree(output); output.mkdir()
reset_peak(); before = peak_bytes()
noise_checkpoint(source, output, **small)
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    grown, size = int(done.stdout.split()[-1]), (source / "model.safetensors").stat().st_size
    assert size > 64 << 20 and grown < 40 << 20, (grown, size)


def test_a_replay_to_disk_holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    source, _ = folders(tmp_path, model_of("llama"), "1GB")
    wanted = dict(noise_checkpoint_module.replay_checkpoint(source, "*", seed=3))
    drawn = []

    def watched(*arguments, **options):
        for name, tensor in replay_checkpoint(*arguments, **options):
            assert all(reference() is None for reference in drawn), "an earlier tensor is still held"
            drawn.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    replay_checkpoint = noise_checkpoint_module.replay_checkpoint
    monkeypatch.setattr(noise_checkpoint_module, "replay_checkpoint", watched)
    described = noise_checkpoint_module.write_replay(source, tmp_path / "n.safetensors", "*", seed=3)
    got = load_file(tmp_path / "n.safetensors")
    assert list(described) == list(wanted) and len(drawn) == len(wanted) > 10
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor) and f"|N| {float(tensor.double().norm()):.6g}" in described[name]


def test_the_command_noises_replays_and_refuses(tmp_path, capsys):
    source, _ = folders(tmp_path, model_of("llama"), "1GB")
    target = tmp_path / "noised"
    rule = '[{match: embeddings, alpha: 0}, {match: "*down_proj*", law: normal, std: 0.5}]'
    assert main(["noise", str(source), str(target), "--alpha=0.5", "--beta=0.7", "--seed=3", f"--rules={rule}"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    name = "model.layers.1.mlp.up_proj.weight"
    drawn = ops.replay(name, before[name].shape, seed=3)
    wanted = (
        before[name].double() * 0.5 + 0.5 * 0.7 * drawn
    )  # in the file: two products and a sum, of float32 factors and draws
    assert_rounded(after[name], wanted, before[name].abs() + drawn.abs(), terms=6)
    name = "model.layers.1.mlp.down_proj.weight"
    drawn = ops.replay(name, before[name].shape, seed=3, law="normal", std=0.5)
    wanted = before[name].double() * 0.5 + 0.5 * 0.7 * drawn
    assert_rounded(after[name], wanted, before[name].abs() + drawn.abs(), terms=6)

    assert main(["noise", str(source), str(tmp_path / "n"), "--seed=3", "--replay=*up_proj*"]) == 0
    drawn = load_file(tmp_path / "n" / "noise.safetensors")
    assert sorted(drawn) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    name = "model.layers.0.mlp.up_proj.weight"
    replayed = ops.replay(name, drawn[name].shape, seed=3)
    assert_rounded(drawn[name], replayed, replayed.abs(), terms=2)
    down = "model.layers.1.mlp.down_proj.weight"
    assert main(["noise", str(source), str(tmp_path / "d"), "--seed=3", "--replay=*1.mlp.down_proj*", f"--rules={rule}"]) == 0
    replayed = load_file(tmp_path / "d" / "noise.safetensors")[down].double()
    wanted = before[down].double() * 0.5 + 0.5 * 0.7 * replayed
    assert_rounded(after[down], wanted, before[down].abs() + replayed.abs(), terms=8)
    capsys.readouterr()
    assert main(["noise", str(source), "-", "--seed=3", "--replay=*up_proj*"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("sha256") == 2 and f"{drawn[name].flatten()[0]:.6g}"[:6] in printed
    assert main(["noise", str(source), "-", "--replay=nothing"]) == 2
    assert main(["noise", str(source), str(tmp_path / "x"), "--rules=[{match: nothing, alpha: 0}]"]) == 2
    assert "rules[0].match: got 'nothing'" in capsys.readouterr().err
    shutil.rmtree(source)
    assert main(["noise", str(source), str(tmp_path / "x")]) == 2


def test_reference_and_default_backend_agree_on_disk(tmp_path):
    source, output = folders(tmp_path, model_of("qwen2_moe", torch.bfloat16), "1GB")
    noise_checkpoint(source, output, **OPTIONS, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    with undo_kernels.backend("reference"):
        noise_checkpoint(source, other, **OPTIONS, progress=False)
    assert (output / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
