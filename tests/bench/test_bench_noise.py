"""Both contenders of the noise benchmark leave tensors of nearly the same norms."""

import importlib
import math
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def bench_noise(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("bench_noise")


def test_both_add_noise_of_the_same_size(bench_noise, monkeypatch):
    monkeypatch.setattr(bench_noise, "ALPHA", 0.5)
    for row in bench_noise.ROWS:
        norms = []
        for build in bench_noise.CONTENDERS.values():
            tensors = {"w": torch.zeros(200, 300, dtype=getattr(torch, row.dtype)), "norm": torch.ones(300)}
            build(tensors, row)()
            norms.append(float(tensors["w"].double().norm()))
            assert torch.equal(tensors["norm"], torch.full((300,), 0.5))
        # Norms of 60,000 draws each, within six standard deviations of their difference; one seed in 500 million exceeds them.
        assert norms[0] == pytest.approx(norms[1], rel=6 / math.sqrt(tensors["w"].numel()))


def test_the_shapes_are_the_published_models(bench_noise):
    sizes = [torch.Size(shape).numel() for shape in bench_noise.shapes(quick=False).values()]
    assert sum(sizes) == 112_904_000
