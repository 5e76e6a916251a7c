"""Parameters that are views train like contiguous copies, or are refused by name if writing to one changes another."""

import importlib.util

import pytest
import torch
from torch import nn
from undo_kernels.ops.layout import overlaps

from undo_core import ops
from undo_core.noise.damage import damage_
from undo_core.training import Batch, TrainConfig, train
from undo_core.training.optimizers import StochasticAdamW
from undo_core.training.precision import PRECISIONS

OPTIMIZERS = ["adamw", "sgd", "adafactor", "adamw-offload"]
if importlib.util.find_spec("torchao") is not None:
    OPTIMIZERS += ["adamw-8bit", "adamw-4bit"]
MODES = [(p, o) for p in PRECISIONS for o in OPTIMIZERS if p != "bfloat16-stochastic" or o.startswith("adamw")]


class Net(nn.Module):
    """Two matrices, one large enough to be quantised in several blocks, a bias and a buffer; as views or not."""

    def __init__(self, views: bool) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        a, b = (0.1 * torch.randn(shape, generator=drawn) for shape in ((272, 256), (64, 272)))
        c, scale = 0.1 * torch.randn(64, generator=drawn), torch.ones(64)
        if views:
            a, b, c = a.T.contiguous().T, torch.cat([b, b], 1)[:, :272], c.repeat_interleave(3)[::3]
            scale = torch.ones(1).expand(64)
        self.a, self.b, self.c = nn.Parameter(a), nn.Parameter(b), nn.Parameter(c)
        self.register_buffer("scale", scale)

    def forward(self, ids):
        hidden = torch.tanh(nn.functional.embedding(ids, self.a))
        return (hidden @ self.a.T @ self.b.T + self.c) * self.scale


def loss(model, batches, counted):
    return model(batches["text"].input_ids).float().square().mean()


def source(step):
    ids = torch.arange(16).view(2, 8).add(step).remainder(272)
    return Batch(ids, torch.ones_like(ids).bool())


def run(views, folder=None, steps=3, **settings):
    model = Net(views)
    config = TrainConfig(steps=steps, batch_size=2, lr=1e-2, eval_every=1, **settings)
    train(model, loss, {"text": source}, config, folder=folder, checkpoint_seconds=0.0, progress=False)
    return model


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("precision", "optimizer"), MODES)
def test_views_move_as_their_contiguous_copies_do(precision, optimizer, tmp_path):
    settings = {"precision": precision, "optimizer": optimizer}
    wanted, start = run(False, **settings), run(False, steps=0, **settings)
    assert not any(torch.equal(p, q) for p, q in zip(wanted.parameters(), start.parameters(), strict=True))

    class Killed(Exception):
        pass

    def killed(step):
        if step == 2:
            raise Killed
        return source(step)

    model, config = Net(True), TrainConfig(steps=3, batch_size=2, lr=1e-2, eval_every=1, **settings)
    options = {"folder": tmp_path, "checkpoint_seconds": 0.0, "progress": False}
    with pytest.raises(Killed):
        train(model, loss, {"text": killed}, config, **options)
    model = Net(True)
    train(model, loss, {"text": source}, config, **options)  # resumes
    assert same_bits(model, wanted)
    assert torch.equal(model.scale, wanted.scale)


@pytest.mark.parametrize("how", ["step_in_backward", "micro_batch_size"])
def test_views_with_another_order_of_steps(how):
    settings = {how: True if how == "step_in_backward" else 1, "precision": "bfloat16-stochastic"}
    assert same_bits(run(True, **settings), run(False, **settings))


def test_the_stochastic_optimizer_alone_moves_a_view():
    whole = torch.randn(40, 30).bfloat16()
    plain, view = nn.Parameter(whole.clone()), nn.Parameter(whole.T.contiguous().T)
    for parameter in (plain, view):
        parameter.grad = torch.ones_like(parameter)
        torch.manual_seed(0)
        StochasticAdamW([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0).step()
    assert torch.equal(plain, view) and not torch.equal(plain, whole)


def test_parameters_that_share_memory_are_refused_by_name_before_anything():
    def refused(model, *names):
        before = {name: p.clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match="parameters: got " + " and ".join(names)):
            train(model, loss, {"text": source}, TrainConfig(steps=1, precision="bfloat16"), progress=False)
        assert all(torch.equal(p, before[name]) and p.dtype == torch.float32 for name, p in model.named_parameters())

    model = Net(False)
    model.b = nn.Parameter(torch.randn(1, 272).expand(64, 272))
    refused(model, "'b', whose elements share memory")
    model = Net(False)
    model.b = nn.Parameter(torch.randn(64 + 272 - 1).unfold(0, 272, 1))
    refused(model, "'b', whose elements share memory")
    model = Net(False)
    model.d = nn.Parameter(model.a.data.T[:5], requires_grad=False)
    refused(model, "'d'", "'a'")


def test_what_only_lies_side_by_side_is_separate():
    whole = torch.zeros(6, 8)
    views = {"left": whole[:, :4], "right": whole[:, 4:].T, "bottom": torch.zeros(3)[1:]}
    assert overlaps(views) == []
    assert overlaps({**views, "row": whole[2]}) == [("left", "row"), ("right", "row")]


def test_views_of_other_dtypes_and_places_are_told_apart():
    memory = torch.zeros(64, dtype=torch.uint8)
    wide, narrow = memory[:32].view(torch.float32), memory[2:4].view(torch.bfloat16)
    odd = torch.frombuffer(memory[33:49].numpy(), dtype=torch.float32)
    assert overlaps({"wide": wide, "narrow": narrow}) == [("wide", "narrow")]
    assert overlaps({"wide": wide, "odd": odd}) == [] and overlaps({"odd": odd, "all": memory}) == [("all", "odd")]
    dilated = torch.zeros(12).as_strided((3, 2), (2, 3))  # its strides alone do not show this
    assert overlaps({"dilated": dilated}) == [] and overlaps({"twice": torch.zeros(12).as_strided((3, 2), (1, 2))}) == [
        ("twice", "twice")
    ]


def test_noise_refuses_a_frozen_parameter_inside_one_that_it_changes():
    model = nn.Linear(4, 6)
    model.part = nn.Parameter(model.weight.detach()[2:], requires_grad=False)
    before = model.weight.detach().clone()
    for change in (
        lambda: ops.noise_(model, alpha=0.5, beta=0.1, seed=0),
        lambda: damage_(model, "prune", strength=0.5, seed=0),
    ):
        with pytest.raises(ValueError, match=r"^tensors: got '(weight|part)' and '(weight|part)', which share memory, wanted"):
            change()
    assert torch.equal(model.weight, before)
    tied = nn.ModuleDict({"a": nn.Linear(4, 6, bias=False), "b": nn.Linear(4, 6, bias=False)})
    tied["b"].weight = nn.Parameter(tied["a"].weight.detach(), requires_grad=False)  # all of it: a tie
    ops.noise_(tied, alpha=1.0, beta=0.0, seed=0)
    assert not tied["b"].weight.any()


def test_damage_changes_a_view_as_its_copy():
    plain, view = nn.ModuleDict({"m": nn.Linear(24, 16)}), nn.ModuleDict({"m": nn.Linear(24, 16)})
    view.load_state_dict(plain.state_dict())
    view["m"].weight = nn.Parameter(plain["m"].weight.data.T.contiguous().T)
    for operator in ("gaussian", "permute-rows", "prune"):
        for model in (plain, view):
            damage_(model, operator, strength=0.3, seed=1)
        assert torch.equal(plain["m"].weight, view["m"].weight)
