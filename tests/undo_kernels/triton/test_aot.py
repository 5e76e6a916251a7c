"""Every Triton kernel compiled for targets that this machine need not have: no spills, shared memory within limits, wgmma.

``UNDO_AOT=all`` compiles every form that is launched, for consumer cards too; the default is the heaviest of each kernel.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

EVERY = os.environ.get("UNDO_AOT") == "all"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942") + (("sm_86",) if EVERY else ())
LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of shared memory a block


def compile_for(target):
    """In a process of its own: kernels that were imported under the interpreter cannot be compiled."""
    command = [sys.executable, "-W", "ignore", "-m", "undo_kernels.triton.aot", target, *(["all"] if EVERY else [])]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports():
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(TARGETS, pool.map(compile_for, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(reports, target):
    spilled = {report["name"]: report["spills"] for report in reports[target] if report["spills"]}
    assert not spilled


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_within_the_limit(reports, target):
    over = {report["name"]: report["shared"] for report in reports[target] if report["shared"] > LIMIT[target] << 10}
    assert not over


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_over_its_logits_is_written_by_the_threads_that_read_them(reports, target):
    inplace = [report for report in reports[target] if "layouts" in report]
    layouts = {report["name"]: report["layouts"] for report in inplace}
    assert len(layouts) >= 2
    assert all(len(names) == 1 for names in layouts.values()), layouts


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_noise_contracts_nothing_but_its_sums_of_squares_and_moves_16_bytes(reports, target):
    noise = [report for report in reports[target] if report["name"].startswith("noise_blocks")]
    assert len(noise) >= 2
    for report in noise:
        assert report["fused"] == report["fused_squares"] > 0, report
        assert report["loads_16"] > 0 and report["stores_16"] == report["loads_16"], report


def test_matrix_kernels_use_wgmma_on_hopper(reports):
    matrix = [report for report in reports["sm_90"] if report["matrix_16"]]
    assert matrix
    assert not [report["name"] for report in matrix if not report["wgmma"]]


def test_matrix_kernels_use_tcgen05_on_blackwell(reports):
    matrix = [report for report in reports["sm_100"] if report["matrix_16"]]
    assert matrix
    assert not [report["name"] for report in matrix if not report["tcgen05"]]


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_was_compiled(reports, target):
    kernels = {report["name"].split()[0] for report in reports[target]}
    assert kernels == {
        "stats_rows", "combine_rows", "loss_rows", "pick_rows", "put_rows", "pick_labels", "stats_tiles", "loss_tiles",
        "noise_blocks", "noise_sums", "rmu_rows",
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_rmu_rows_is_light_in_every_dtype(reports, target):
    found = {report["name"]: report for report in reports[target] if report["name"].startswith("rmu_rows ")}
    assert all(any(f" {kind} to" in name for name in found) for kind in ("bf16", "fp16", "fp32"))
    assert all(report["spills"] == 0 and report["registers"] <= 128 for report in found.values())
