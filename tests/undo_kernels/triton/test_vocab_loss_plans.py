"""The plans of the Triton losses: chunks, workspace, what they cost, and that no driver waits for its GPU."""

import dataclasses
import itertools

import pytest
import torch
from rounding import probability_error, relative
from triton_problems import DENSE, DEVICE, SPARSE, TARGETS, check, moved, problem, vocab_loss
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import combine, costs, row_kernels, tile_kernels, tile_table
from undo_kernels.triton import plan as plans
from undo_kernels.triton import vocab_loss as driver
from undo_kernels.triton.products import Workspace

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_bfloat16_weight_over_many_chunks_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(plans, "_SUMMED_CHUNKS", 1)
    p = problem("forward", rows=33, dtype=torch.bfloat16, plan="chunk", workspace_bytes=40_000)
    plan = plans.gpu_plan(moved(p))
    assert plan.accumulator
    assert plan.rows_per_chunk < 33
    check(p)


@pytest.mark.parametrize("target", ["own", "forward", "jsd"])
def test_several_chunks_give_one_answer(target):
    p = problem(target, rows=21, vocabulary=211, labels=True, bias=True, padding=3)
    whole = vocab_loss(dataclasses.replace(p, plan="chunk"))
    s = plans.Shapes(p, tile_table.target_of(DEVICE))
    for plan, small in (("chunk", plans.chunk_plan(s, 8)), ("recompute", plans.recompute_plan(s, 1))):
        budget = small.workspace_bytes
        part = dataclasses.replace(p, plan=plan, workspace_bytes=budget)
        chosen = plans.gpu_plan(moved(part))
        assert chosen.rows_per_chunk < 21 if plan == "chunk" else chosen.block_v < 211
        got = check(part)
        # what the rows' products with d_hidden sum to may be formed in another order
        assert relative(got.d_weight, whole.d_weight) <= 2 * probability_error(p.student.hidden, p.student.weight, 211)


def test_workspace_too_small_names_the_least():
    p = problem("forward", workspace_bytes=100)
    with pytest.raises(ValueError, match=r"workspace_bytes: got 100, wanted at least \d+") as refusal:
        vocab_loss(p)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    check(dataclasses.replace(p, workspace_bytes=least))


def test_unknown_plan_and_dtype_are_refused():
    with pytest.raises(ValueError, match="plan"):
        vocab_loss(problem("forward", plan="fastest"))
    with pytest.raises(ValueError, match="recompute"):
        vocab_loss(problem("bucket", plan="recompute"))
    with pytest.raises(TypeError, match="float64"):
        vocab_loss(problem("own", dtype=torch.float64))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_give_the_same_bits(plan, dtype):
    p = problem("jsd", rows=18, dtype=dtype, plan=plan, labels=True, bias=True, masked=0.3, max_counted=16)
    for a, b in zip(vocab_loss(p), vocab_loss(p), strict=True):
        assert torch.equal(a, b)


def shaped(width, known=False, target="forward", rows=8192, vocabulary=256_000, dtype=torch.bfloat16, **options):
    """A problem of full size on the meta device."""

    def new(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    row = torch.empty(rows, device="meta")
    student, teacher = (Projection(new(rows, width), new(vocabulary, width)) for _ in range(2))
    teacher = teacher if target in DENSE else None
    options = {"needs": (True, True, False), **options}
    return Problem(student, target, row, teacher=teacher, lse_t=row if known else None, **options)


def test_the_width_decides_the_plan(monkeypatch):
    """Recomputed products cost more the wider the hidden states are; stored logits cost the same bytes at every width."""
    assert plans.gpu_plan(shaped(2304), "sm_90").name == "chunk"
    monkeypatch.setattr(costs, "CACHE", 1e15)  # operands at no cost, and products as fast as the library's
    monkeypatch.setattr(costs, "TILES_16", costs.MATRIX_16)
    monkeypatch.setattr(costs, "FILL_SECONDS", 0.0)
    assert plans.gpu_plan(shaped(64), "sm_90").name == "recompute"
    widths = range(64, 8192, 64)
    slow, known = (next(w for w in widths if plans.gpu_plan(shaped(w, k), "sm_90").name == "chunk") for k in (False, True))
    assert known > slow  # the teacher's log-sum-exps save the recompute plan a product


def test_time_is_the_slowest_of_products_bytes_and_instructions(monkeypatch):
    wide = shaped(2304)
    before = plans._chunk_plans(plans.Shapes(wide, "sm_90"), None)[0].seconds
    heavy = costs.INSTRUCTIONS["loss_rows", False]
    monkeypatch.setitem(costs.INSTRUCTIONS, ("loss_rows", False), (heavy[0] + 1, heavy[1]))
    assert plans._chunk_plans(plans.Shapes(wide, "sm_90"), None)[0].seconds == before  # it waits for memory
    monkeypatch.setitem(costs.INSTRUCTIONS, ("loss_rows", False), (200.0, heavy[1]))
    more = plans._chunk_plans(plans.Shapes(wide, "sm_90"), None)[0].seconds - before
    pairs = 8192 * 256_000
    slots = 132 * 4 * 1.98e9  # of an H200, each for 32 lanes
    assert more == pytest.approx(200 * pairs / 32 / slots - 10 * pairs / 4.3e12)


def test_plans_count_products_and_bytes():
    s = plans.Shapes(shaped(2304), "sm_90")
    pairs, width = 8192 * 256_000, 2304
    chunk, recomputed = plans._chunk_plans(s, None)[0], plans._recompute_plans(s, None)[0]
    assert chunk.flops == 4 * 2 * pairs * width
    assert recomputed.flops == 6 * 2 * pairs * width
    assert 1536 <= chunk.rows_per_chunk <= 2048  # the tiles of the hidden gradient's product fill a wave
    assert not chunk.accumulator
    assert 4e9 < chunk.workspace_bytes < 5.4e9
    assert recomputed.workspace_bytes < 5e8
    known = plans.Shapes(shaped(2304, known=True), "sm_90")
    assert plans._recompute_plans(known, None)[0].flops == 5 * 2 * pairs * width


def test_a_bound_on_the_workspace_holds_in_every_plan():
    for width, budget in ((320, 1 << 28), (2304, 1 << 30), (2304, 3 << 28)):
        plan = plans.gpu_plan(shaped(width, workspace_bytes=budget), "sm_90")
        assert plan.workspace_bytes <= budget


class _NoKernel:
    """Stands in for a kernel where no device is."""

    def __getitem__(self, grid):
        assert all(n > 0 for n in grid)
        assert all(n <= 65535 for n in grid[1:])
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drivers_never_wait_for_a_gpu(monkeypatch, dtype, plan):
    """On meta tensors, which have no values to look at: any synchronisation raises, and so do dtypes that torch refuses."""
    for module, names in (
        (combine, ("combine_rows",)),
        (row_kernels, ("stats_rows", "loss_rows", "pick_rows", "put_rows")),
        (tile_kernels, ("stats_tiles", "loss_tiles", "pick_labels")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _NoKernel())
    monkeypatch.setattr(tile_table, "target_of", lambda device: "sm_90")
    monkeypatch.setattr(driver, "INTERPRETED", True)  # or it would want a GPU
    for target, given in itertools.product((*TARGETS, *SPARSE), (False, True)):
        if plan == "recompute" and (target in SPARSE or given):
            continue
        with torch.device("meta"):
            n, v, d = 300, 1000, 64

            def new(*shape, dtype=dtype):
                return torch.empty(*shape, dtype=dtype)

            def side(new=new, given=given, n=n, v=v, d=d):
                hidden = new(n, v if given else d)
                return (
                    GivenLogits(hidden, hidden)
                    if given
                    else Projection(hidden, new(v, d), new(v), softcap=30.0, vocab_size=v - 3)
                )

            row = torch.empty(n)
            p = Problem(
                side(), target, row, row, torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.bool),
                side() if target in DENSE else None, torch.empty(n, 7, dtype=torch.int64), torch.empty(n, 7),
                needs=(True, not given, not given), plan=plan, statistics=True, max_counted=250,
            )  # fmt: skip
            for part in (p, dataclasses.replace(p, max_counted=None, workspace_bytes=4_000_000)):
                got = driver.run(part, Workspace(torch.device("meta")))
                assert all(t.device.type == "meta" for t in got)
                assert got.d_hidden.shape == p.student.hidden.shape
                assert got.d_hidden.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_describe():
    plan = plans.describe("linear_kl_div", shaped(640))
    assert plan.seconds > 0
    assert plan.name in str(plan)


def test_every_tile_of_the_table_is_a_power_of_two():
    for target, kernel, wide in itertools.product(tile_table.TARGETS, tile_table.KERNELS, (False, True)):
        for tile in tile_table.tiles(target, kernel, wide):
            assert all(n & (n - 1) == 0 for n in (tile.block_t, tile.block_v, tile.block_d, tile.warps, tile.pieces))
