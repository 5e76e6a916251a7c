"""Long tests of several ranks: every stage on every model, resuming 4 -> 2 -> 1, and killed commands. `make test-distributed`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from long_rank_cases import BOUNDS, CHANGES, CONFIGS, PLANNED, SMALL, curve, describe, peak, predicted_peak
from rank_cases import MODELS, STAGES, first_gradients, largest_error, untied
from ranks import free_port, on_ranks
from safetensors.torch import load_file
from transformers import AutoConfig

from undo_core import distributed

pytestmark = pytest.mark.distributed_long

ROOT = Path(__file__).resolve().parents[3]


def possible(stage: str, model: str, change: str) -> bool:
    """Whether the case is one that a single process accepts as well, and gives the same value for any split."""
    drops = model == "tied" and change == "checkpointing"
    parts = stage.startswith("repnoise") and change == "micro-batches"
    return not (drops or parts or (stage == "sam" and "bfloat16" in change) or (stage == "relearn-lora" and "master" in change))


def gradients(cases):
    found = {case: first_gradients(MODELS[case[1]](), STAGES[case[0]], CONFIGS[case[2]]) for case in cases}
    return found if distributed.rank() == 0 else None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_stage_and_model_has_the_gradients_of_one_process(ranks, change):
    stages = STAGES if change == "whole" else ("pretrain", "graddiff", "npo", "rmu", "sam", "distill-resident", "relearn-lora")
    cases = [(stage, model, change) for stage in stages for model in MODELS if possible(stage, model, change)]
    found, wanted = on_ranks(ranks, gradients, cases)[0], gradients(cases)
    errors = {case: largest_error(found[case], wanted[case]) for case in cases}
    assert max(errors.values()) < BOUNDS[change], {case: error for case, error in errors.items() if error >= BOUNDS[change]}


@pytest.mark.parametrize("order", [(4, 2, 1), (1, 2, 4), (2, 4, 2)])
def test_a_run_moves_between_numbers_of_ranks(tmp_path, order):
    state, history = curve(untied, None)
    for last, ranks in zip((3, 6, None), order, strict=True):
        found = curve(untied, tmp_path, 1, last) if ranks == 1 else on_ranks(ranks, curve, untied, tmp_path, 1, last)[0]
    assert largest_error(found[0], state) < 1e-5
    assert [entry["nats"] for entry in found[1]] == pytest.approx([entry["nats"] for entry in history], rel=1e-5)
    assert [entry.get("loss", 0) for entry in found[1]] == pytest.approx([entry.get("loss", 0) for entry in history], rel=1e-5)


# -- memory ------------------------------------------------------------------------------------------------------------------------

LLAMA = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", PLANNED)
def test_the_peak_of_a_rank_is_predicted(stage, tied, capsys):
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **LLAMA)
    predicted, measured = predicted_peak(stage, config), on_ranks(2, peak, stage, config)
    with capsys.disabled():
        print(describe(stage, tied, predicted, measured))
    assert measured == pytest.approx([predicted] * 2, rel=0.15)


# -- commands ----------------------------------------------------------------------------------------------------------------------

PATIENCE = 900  # seconds; a test waits for what it needs, and this long only if that never comes


def command(folder, ranks, *flags):
    """The command of a run on ``ranks`` ranks, or of a plain run."""
    config = folder.parent / "small.yaml"
    config.write_text(yaml.safe_dump(SMALL))
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={free_port()}"] if ranks > 1 else []
    program = [str(ROOT / "tests" / "support" / "quick_checkpoints.py")] if ranks > 1 else ["-m", "undo_core"]
    return [sys.executable, *launcher, *program, "run", str(config), f"--output={folder}", *flags]


def children(process):
    """Processes that a process has started."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def call(*arguments):
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=PATIENCE,
    )


def weights(folder):
    files = sorted(folder.glob("stages/*/model.safetensors"))
    return {f"{path.parent.name}/{name}": tensor for path in files for name, tensor in load_file(path).items()}


def manifests(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("stages/*/manifest.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of uninterrupted runs on one and on two ranks."""
    base = tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        done = call(base / str(ranks), ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report.html") == 1  # one rank prints
    return base


def test_a_run_on_two_ranks_has_the_stages_and_weights_of_a_plain_run(whole):
    one, two = manifests(whole / "1"), manifests(whole / "2")
    assert one.keys() == two.keys()
    assert {name: facts.get("ranks") for name, facts in one.items()} == dict.fromkeys(one)
    assert {facts.get("ranks") for name, facts in two.items() if "steps" in facts} == {2}
    got, wanted = weights(whole / "2"), weights(whole / "1")
    for name in one:  # over all tensors of a stage: rounding shows most in norms that training has hardly moved from 0
        pairs = [(got[key], tensor) for key, tensor in wanted.items() if key.startswith(name)]
        off, size = (
            sum(float(x.square().sum()) for x in parts) for parts in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        assert off <= (1e-4) ** 2 * size, (name, (off / size) ** 0.5)
    for name, facts in one.items():
        for got, wanted in zip(two[name].get("history", []), facts.get("history", []), strict=True):
            assert got.get("loss", 0) == pytest.approx(wanted.get("loss", 0), rel=1e-4)


@pytest.mark.parametrize("victims", ["a rank", "the launcher", "all"])
def test_killed_with_signal_9_the_same_command_continues_to_the_same_bits(whole, tmp_path, victims):
    process = subprocess.Popen(
        command(tmp_path / "run", 2), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "run").glob("stages/.pretrain-*/checkpoint/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 2
    for victim in {"a rank": ranks[1:], "the launcher": [process.pid], "all": [process.pid, *ranks]}[victims]:
        os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    deadline = time.monotonic() + PATIENCE
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlives the others"
        time.sleep(0.1)
    assert sum(line.startswith("undo: ") for line in errors.splitlines()) <= 1, errors
    done = call(tmp_path / "run", 2)
    assert done.returncode == 0, done.stderr
    got, wanted = weights(tmp_path / "run"), weights(whole / "2")
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_one_failure_gives_one_message(tmp_path):
    done = call(tmp_path / "run", 2, "--distill.train.optimizer=adafactor")
    said = [line for line in done.stderr.splitlines() if line.startswith("undo: ")]
    assert done.returncode != 0 and len(said) == 1 and "optimizer: got adafactor on 2 ranks" in said[0], done.stderr
    assert not list((tmp_path / "run").glob("stages/*"))  # before anything ran
    done = call(tmp_path / "run", 2, "--pretrain.train.lr=1e30")
    said = [line for line in done.stderr.splitlines() if line.startswith("undo: ")]
    assert done.returncode != 0 and len(said) == 1 and "lower lr" in said[0], done.stderr
