"""Kernels are launched on their tensors' GPU, whichever is the current one: on tensors that have a device and no memory."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from undo_kernels.noise_segments import Segment
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from undo_kernels.triton import combine, device, noise, rmu, row_kernels, tile_kernels, tile_table
from undo_kernels.triton import vocab_loss as driver

DEVICE = torch.device("cuda:1")
KERNELS = {
    combine: ("combine_rows",),
    row_kernels: ("stats_rows", "loss_rows", "pick_rows", "put_rows"),
    tile_kernels: ("stats_tiles", "loss_tiles", "pick_labels"),
    rmu: ("rmu_rows",),
    noise: ("noise_blocks", "noise_sums"),
}


@pytest.fixture
def launches(monkeypatch):
    """What was launched, with the GPU that was made the current one for it."""
    entered, seen = [], []

    @contextlib.contextmanager
    def entering(where):
        entered.append(where)
        yield
        entered.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((self.name, entered[-1] if entered else None))

    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Kernel(name))
    monkeypatch.setattr(torch.cuda, "device", entering)
    monkeypatch.setattr(tile_table, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(driver, "current", entering)  # its driver's slices need a meta tensor, which has no GPU
    with FakeTensorMode():
        yield seen


def new(*shape, dtype=torch.bfloat16, device=DEVICE):
    return torch.empty(*shape, dtype=dtype, device=device)


def test_the_current_device_is_changed_for_gpus_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda where: ("current", where))
    assert device.current(DEVICE) == ("current", DEVICE)
    assert isinstance(device.current(torch.device("cpu")), contextlib.nullcontext)


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_losses(launches, plan):
    with torch.device("meta"):
        student, teacher = (Projection(new(300, 64, device=None), new(1000, 64, device=None)) for _ in range(2))
        row, counted = torch.empty(300), torch.empty(300, dtype=torch.bool)
    p = Problem(student, "jsd", row, counted=counted, teacher=teacher, needs=(True, True, False), plan=plan)
    driver.vocab_loss(p)
    assert {name for name, _ in launches} >= ({"loss_rows"} if plan == "chunk" else {"stats_tiles", "loss_tiles"})
    assert {where for _, where in launches} == {torch.device("meta")}


def test_rmu(launches):
    total, gradient = rmu.rmu_loss(new(6, 32), new(32), None, 2.0, True)
    assert total.device == gradient.device == DEVICE
    assert launches == [("rmu_rows", DEVICE)]


def test_noise(launches, monkeypatch):
    monkeypatch.setattr(noise, "INTERPRETED", False)
    monkeypatch.setattr(noise, "_table", lambda chosen, seed: (new(1, 15, dtype=torch.int64), 1))  # it asks for addresses
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    sums = noise.noise_([Segment(new(8, 4), "w", "uniform", 0.5, 1e-8)], 1, True)
    assert sums.device == DEVICE
    assert launches == [("noise_blocks", DEVICE), ("noise_sums", DEVICE)]
