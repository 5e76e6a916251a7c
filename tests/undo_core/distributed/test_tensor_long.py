"""Long tests of ranks that share a head: every stage on every model, other settings, resuming, memory, and commands. `make test-distributed`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from long_rank_cases import BOUNDS, CHANGES, CONFIGS, PLANNED, SMALL, curve, describe, peak, predicted_peak
from rank_cases import MODELS, STAGES, demo, first_gradients, largest_error
from ranks import free_port, on_ranks
from safetensors.torch import load_file
from transformers import AutoConfig

from undo_core import distributed
from undo_core.distributed import ParallelConfig

pytestmark = pytest.mark.distributed_long

ROOT = Path(__file__).resolve().parents[3]
SOME = ("pretrain", "npo", "rmu", "undial", "distill-resident", "distill-topk", "relearn")


def gradients(cases, tensor):
    distributed.arrange(ParallelConfig(tensor))
    found = {case: first_gradients(MODELS[case[1]](), STAGES[case[0]], CONFIGS[case[2]]) for case in cases}
    return found if distributed.rank() == 0 else None


LAYOUTS = [*((ranks, tensor, "whole") for ranks, tensor in ((2, 2), (4, 2), (4, 4))), *((4, 2, change) for change in CHANGES)]


@pytest.mark.parametrize(("ranks", "tensor", "change"), dict.fromkeys(LAYOUTS))
def test_every_stage_and_model_has_the_gradients_of_one_process(ranks, tensor, change):
    # A single process does not accept GPT-2's dropout with checkpointing.
    models = [name for name in MODELS if not (name == "tied" and change == "checkpointing")]
    cases = [(stage, model, change) for stage in (STAGES if change == "whole" else SOME) for model in models]
    found, wanted = on_ranks(ranks, gradients, cases, tensor)[0], gradients(cases, 1)
    errors = {case: largest_error(found[case], wanted[case]) for case in cases}
    assert max(errors.values()) < BOUNDS[change], {case: error for case, error in errors.items() if error >= BOUNDS[change]}


@pytest.mark.parametrize(
    "order", [((4, 2), (2, 1), (1, 1)), ((1, 1), (2, 2), (4, 4)), ((4, 1), (4, 2), (2, 2)), ((2, 2), (4, 2), (2, 2))]
)
def test_a_run_moves_between_layouts(tmp_path, order):
    state, history = curve(demo, None)
    for last, (ranks, tensor) in zip((3, 6, None), order, strict=True):
        alone = ranks == 1
        found = curve(demo, tmp_path, 1, last) if alone else on_ranks(ranks, curve, demo, tmp_path, tensor, last)[0]
    assert largest_error(found[0], state) < 1e-5
    for name in ("nats", "loss"):
        assert [entry.get(name, 0) for entry in found[1]] == pytest.approx([entry.get(name, 0) for entry in history], rel=1e-5)


@pytest.mark.parametrize(("ranks", "tensor"), [(2, 2), (4, 2)])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, ranks, tensor):
    state, history = on_ranks(ranks, curve, demo, None, tensor)[0]
    on_ranks(ranks, curve, demo, tmp_path, tensor, 5)
    resumed, again = on_ranks(ranks, curve, demo, tmp_path, tensor)[0]
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in state.items()) and history == again


# -- memory ------------------------------------------------------------------------------------------------------------------------

LLAMA = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 64000}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", PLANNED)
def test_the_peak_of_a_rank_is_predicted(stage, tied, capsys):
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **LLAMA)
    predicted, measured = predicted_peak(stage, config, tensor=2), on_ranks(2, peak, stage, config, 2)
    with capsys.disabled():
        print(describe(stage, tied, predicted, measured))
    assert measured == pytest.approx([predicted] * 2, rel=0.15)


# -- commands ----------------------------------------------------------------------------------------------------------------------


def call(folder, ranks, *flags):
    config = folder.parent / "small.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "undo_core", "run", str(config), f"--output={folder}", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=900)


def test_a_run_with_shared_heads_has_the_stages_and_weights_of_a_plain_run(tmp_path):
    done = [call(tmp_path / "1", 1), call(tmp_path / "4", 4, "--parallel.tensor=2")]
    assert [one.returncode for one in done] == [0, 0], [one.stderr for one in done]
    folders = {number: sorted(path.parent for path in (tmp_path / number).glob("stages/*/manifest.json")) for number in "14"}
    assert [folder.name for folder in folders["1"]] == [folder.name for folder in folders["4"]]
    for one, four in zip(folders["1"], folders["4"], strict=True):
        facts = json.loads((four / "manifest.json").read_text())
        if "steps" in facts:
            assert (facts["ranks"], facts["tensor"]) == (4, 2)
        if not (one / "model.safetensors").exists():
            continue
        got, wanted = (load_file(folder / "model.safetensors") for folder in (four, one))
        assert got.keys() == wanted.keys()
        off = sum(float((got[name] - tensor).square().sum()) for name, tensor in wanted.items())
        assert off <= (1e-4) ** 2 * sum(float(tensor.square().sum()) for tensor in wanted.values()), one.name


def test_a_layout_that_does_not_fit_is_one_message_before_anything_runs(tmp_path):
    for ranks, message in ((1, "for a process that runs alone"), (2, "on 2 ranks, wanted a divisor of 2")):
        done = call(tmp_path / "run", ranks, "--parallel.tensor=3")
        said = [line for line in done.stderr.splitlines() if line.startswith("undo: ")]
        assert done.returncode != 0 and len(said) == 1 and f"parallel.tensor: got 3 {message}" in said[0], done.stderr
        assert not (tmp_path / "run").exists()
