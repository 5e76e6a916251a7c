"""The smaller benchmarks run, record what they measure, and print a table each."""

import importlib
import json

import pytest
import undo_kernels
from rounding import PATH, gamma

KERNELS = "reference" if "cpu" in undo_kernels.unavailable() else "cpu"
SUITES = {
    "noise": (["--quick", "--rounds", "2", "--only", "f32-uniform"], "xavier-uniform, float32"),
    "rmu": (["--quick", "--rounds", "2"], "layers 1 to 2 of 4"),
    "step": (["--quick", "--steps", "3", "--modes", "float32", "cached"], "float32, cached teacher"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_a_quick_run_gives_a_table(suite, tmp_path):
    """Each contender's memory is measured in a separate process, which imports everything, so the test uses few."""
    arguments, expected = SUITES[suite]
    results, document = tmp_path / "results.json", tmp_path / "page.md"
    importlib.import_module(f"bench_{suite}").main([*arguments, "--out", str(results)])
    document.write_text(f"<!-- bench:{suite}-cpu -->\n<!-- /bench:{suite}-cpu -->\n")
    tables = importlib.import_module("tables")
    assert tables.main([str(document), str(results)]) == 0
    text = document.read_text()
    assert expected in text and text.count("\n| ") >= 2 and "None" not in text
    assert tables.main([str(document), "--check"]) == 0
    rows = json.loads(results.read_text())["rows"]
    for row in rows:
        assert row["provenance"]["command"].startswith(f"python bench/bench_{suite}.py")
        for record in row["contenders"]:
            assert len(record["samples_s"]) >= 2 and all(sample > 0 for sample in record["samples_s"])
            assert suite == "step" or record["memory"]["extra_bytes"] >= 0
            used = {call["backend"] for calls in record["ran"].values() for call in calls}
            assert used == (set() if record["name"] in ("torch", "usual", "plain") else {KERNELS}), record["name"]
            if "verification" in record:
                assert record["verification"]["ran"] == record["ran"]
    if suite == "step":
        losses = {record["name"]: record["loss"] for record in rows[0]["contenders"]}
        # Each has the roundings of its own path and of the weights after the previous steps.
        assert losses["float32"] == losses["cached"] == pytest.approx(losses["plain"], rel=4 * gamma(PATH))


def test_the_loops_of_the_step_agree():
    """Without undo-core, with its loss, and with its gradients in place: the same losses, where each step depends on the last."""
    import bench_step
    import torch
    from transformers import AutoConfig

    from undo_core.data.sequences import Sequences
    from undo_core.models import initialise
    from undo_core.training import TrainConfig

    sizes = {"vocab_size": 8209, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("gemma2", num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, **sizes)
    ids = torch.randint(1, 8209, (4, 33), generator=torch.Generator().manual_seed(0))
    train = TrainConfig(steps=2, batch_size=2, lr=1e-3, seed=0)
    losses = {}
    for kind in ("logits", "op", "in place"):
        student, teacher = initialise(config, seed=0), initialise(config, seed=1)
        losses[kind] = bench_step.plain_loop(student, teacher, Sequences(ids.to(torch.int32), pad_id=0), train, kind)
    assert losses["op"] == pytest.approx(losses["logits"], rel=4 * gamma(PATH))
    assert losses["in place"] == pytest.approx(losses["logits"], rel=4 * gamma(PATH))
