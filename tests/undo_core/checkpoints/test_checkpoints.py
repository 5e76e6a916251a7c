"""Every reader of a checkpoint folder gets the same files, ties and bits as transformers' from_pretrained."""

import json
from pathlib import Path

import pytest
import torch
from causal_models import build
from safetensors.torch import load_file, save_file
from tokenizer_kinds import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core import noise_
from undo_core.checkpoints.files import checkpoint_skeleton, settled_configuration, stored_dtype
from undo_core.checkpoints.parameters import CheckpointParameters
from undo_core.data.config import DataConfig
from undo_core.distillation.streaming import WeightReader, load_head, stream_model, weights_digest
from undo_core.models import head_of, initialise, load_model
from undo_core.models.config import ModelConfig
from undo_core.models.folder import INDEX, SINGLE, weight_files
from undo_core.noise.checkpoint import noise_checkpoint
from undo_core.pipeline.config import ControlsConfig, RunConfig
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.stage import Folder, Work
from undo_core.pipeline.stages import Initialise
from undo_core.pipeline.store import Store
from undo_core.planning.table import plan_rows

IDS = torch.arange(8)[None] * 7 % 60 + 3
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read(folder):
    return load_file(folder / SINGLE)


def write(folder, tensors):
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def own_head(folder):
    tensors = read(folder)
    write(folder, {**tensors, HEAD: tensors[EMBEDDING].flip(0).contiguous() * 3})


def same_head(folder):
    tensors = read(folder)
    write(folder, {**tensors, HEAD: tensors[EMBEDDING].clone()})


def other_name(folder):
    tensors = read(folder)
    write(folder, {HEAD: tensors.pop(EMBEDDING), **tensors})


def stale_index(folder):
    """An index that an older, sharded save left beside the single file."""
    tensors = {name: tensor + 1 for name, tensor in read(folder).items()}
    save_file(tensors, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")


def other_file(folder):
    """The configuration names the file, and a file with the usual name lies beside it."""
    tensors = read(folder)
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "other.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "other.safetensors"}), encoding="utf-8")


TIED = {"tie_word_embeddings": True}
CASES = {
    "sharded": ("llama", TIED, "10KB", None),
    "own head": ("llama", TIED, "1GB", own_head),
    "own head, sharded": ("llama", TIED, "10KB", None),
    "same head": ("llama", TIED, "1GB", same_head),
    "the other name": ("llama", TIED, "1GB", other_name),
    "stale index": ("llama", {}, "1GB", stale_index),
    "named file": ("llama", {}, "1GB", other_file),
    **{
        name: (name, {}, "1GB", None)
        for name in (
            "bloom",
            "gpt2",
            "gpt_oss",
            "llama4",
            "gemma3",
            "modernbert-decoder",
            "qwen3_moe",
            "mamba",
            "bart",
            "deepseek_v4",
        )
    },
}


LLAMAS = [name for name, case in CASES.items() if case[0] == "llama"]


@pytest.fixture(params=CASES, ids=str)
def folder(request, tmp_path):
    kind, settings, size, change = CASES[request.param]
    model = build(kind, **settings)
    if request.param == "own head, sharded":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0) * 3)
    model.save_pretrained(tmp_path, max_shard_size=size)
    if change is not None:
        change(tmp_path)
    return tmp_path


def test_every_reader_agrees_with_transformers(folder, tmp_path_factory):
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tied = theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight
    with torch.no_grad():
        wanted = theirs(input_ids=IDS).logits
        model = load_model(folder).eval()
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
        assert torch.equal(stream_model(folder)(input_ids=IDS).logits, wanted)
    reader, head = WeightReader(folder), head_of(model)
    found = load_head(reader)
    assert torch.equal(found.weight, head.weight) and (found.scale, found.softcap) == (head.scale, head.softcap)
    assert weights_digest(model) == reader.digest() == weights_digest(theirs)
    empty = checkpoint_skeleton(folder)
    named = {
        name: tensor.clone()
        for part in CheckpointParameters(folder, empty, dict(empty.named_parameters())).read("read", False)
        for name, tensor in part.items()
    }
    assert named.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(named[name], parameter) for name, parameter in theirs.named_parameters())
    again = tmp_path_factory.mktemp("again")
    model.save_pretrained(again)
    with torch.no_grad():
        assert torch.equal(load_model(again).eval()(input_ids=IDS).logits, wanted), "saved and loaded again"


def test_what_is_made_from_a_configuration_has_the_parameters_that_are_loaded(folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
    config = settled_configuration(folder)
    assert {name: parameter.shape for name, parameter in initialise(config, 0).named_parameters()} == shapes
    predicted = (
        Predictor(config, 9, device="cpu").phases(Initialise(seed=0, model=Folder(Path("nowhere"))), torch.float32)[0].weights
    )
    assert predicted == sum(4 * parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("change", [own_head, same_head])
def test_the_random_student_and_the_plan_have_the_head_of_the_files(tmp_path, change):
    source, output = tmp_path / "source", tmp_path / "student"
    build("llama", **TIED, vocab_size=300).save_pretrained(source)
    tokenizer_of("llama").save_pretrained(source)
    change(source)
    output.mkdir()
    Initialise(seed=1, model=Folder(source)).run(Work({"model": source}, tmp_path, output, "random student"))
    theirs, student = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, output))
    assert dict(student.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    own = student.lm_head.weight is not student.model.embed_tokens.weight
    assert own == (change is own_head)
    assert not own or not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight), "drawn apart"

    (tmp_path / "text.txt").write_text("one\ntwo\n")
    data = DataConfig(kind="text", retain=[str(tmp_path / "text.txt")], forget=[str(tmp_path / "text.txt")], length=9)
    config = RunConfig(
        "planned", str(tmp_path), ModelConfig(path=str(source)), data=data, controls=ControlsConfig(filter=False)
    )
    lines, _ = plan_rows(config, Store(tmp_path / "stages"))
    assert lines[0].disk_bytes == 4 * sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("folder", LLAMAS, indirect=True)
def test_the_noise_on_disk_reads_what_is_loaded(folder, tmp_path_factory):
    output, model = tmp_path_factory.mktemp("noised"), load_model(folder).eval()
    noise_checkpoint(folder, output, alpha=0.5, seed=3, progress=False)
    noise_(model, alpha=0.5, seed=3)
    with torch.no_grad():
        assert torch.equal(load_model(output).eval()(input_ids=IDS).logits, model(input_ids=IDS).logits)
        theirs = AutoModelForCausalLM.from_pretrained(output).eval()
        assert torch.equal(theirs(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert (output / INDEX).exists() == (weight_files(folder)[0].name not in (SINGLE, "other.safetensors"))


def test_what_is_not_read_decides_nothing(tmp_path):
    build("llama").save_pretrained(tmp_path)
    save_file({"extra": torch.zeros(2, dtype=torch.float16)}, tmp_path / "extra.safetensors")
    stale_index(tmp_path)
    assert [path.name for path in weight_files(tmp_path)] == [SINGLE] and stored_dtype(tmp_path) == torch.float32


def test_an_adapter_beside_the_weights_is_refused_where_it_would_be_left_out(tmp_path):
    build("llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds an adapter \(adapter_config.json\)"):
        weight_files(tmp_path)


def test_a_model_that_transformers_cannot_make_is_refused_by_name():
    for kind in ("musicgen", "vit"):
        with pytest.raises(ValueError, match=f"model: got {kind}, of which transformers' AutoModelForCausalLM makes no model"):
            initialise(AutoConfig.for_model(kind), 0)
