"""The noise benchmark measures both contenders, on tensors that both leave close to each other in size."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench_noise(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_noise")


def test_a_quick_run_records_both(bench_noise, tmp_path, capsys):
    path = tmp_path / "noise.json"
    bench_noise.main(["--quick", "--rounds", "2", "--only", "bf16-uniform", "--out", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert [record["name"] for record in row["contenders"]] == ["undo-core", "torch"]
    for record in row["contenders"]:
        assert len(record["samples_s"]) == 2 and record["memory"]["extra_bytes"] >= 0
    assert "bf16-uniform" in capsys.readouterr().out


def test_both_add_noise_of_the_same_size(bench_noise, monkeypatch):
    monkeypatch.setattr(bench_noise, "ALPHA", 0.5)
    for row in bench_noise.ROWS:
        norms = []
        for build in bench_noise.CONTENDERS.values():
            tensors = {"w": torch.zeros(200, 300, dtype=getattr(torch, row.dtype)), "norm": torch.ones(300)}
            build(tensors, row)()
            norms.append(float(tensors["w"].double().norm()))
            assert torch.equal(tensors["norm"], torch.full((300,), 0.5))
        assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_the_shapes_are_the_published_models(bench_noise):
    sizes = [torch.Size(shape).numel() for shape in bench_noise.shapes(quick=False).values()]
    assert sum(sizes) == 112_904_000
