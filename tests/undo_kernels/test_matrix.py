"""The table of instruction sets reports a wrong cell as wrong, and its known answers are those of the reference."""

import math
import os
import shutil
import subprocess
from pathlib import Path

import instruction_matrix as matrix
import pytest
import torch
from instruction_matrix import Cell, Line
from near_agreement import Near
from noise_answers import KNOWN, digests
from undo_kernels import cpu, ops, reference

ROOT = Path(__file__).resolve().parents[2]
compiled = pytest.mark.skipif(cpu.noise.kernels is None, reason="no C++ compiler was here when undo-core was installed")


@pytest.fixture
def small(monkeypatch):
    """One kind of loss, of one teacher, with the vector units that every processor has."""
    monkeypatch.setenv("UNDO_CPU_ISA", "plain")
    monkeypatch.setattr(matrix, "SPREADS", (1.0,))
    monkeypatch.setattr(matrix.near, "KINDS", ("forward",))
    monkeypatch.setattr(cpu.plan, "_BLOCK_V", cpu.plan._BLOCK_V)


@compiled
def test_a_right_cell_passes(small):
    cell = matrix.by_kernels("plain", "float32")
    assert cell.failures == [] and cell.noise and 0 < cell.loss < 1e-3 and 0 < cell.gradient < 3e-3
    assert matrix.by_torch("float32").gradient > cell.gradient, "plain torch loses the difference"


@compiled
def test_another_instruction_set_than_the_named_one_fails(small):
    failed = matrix.by_kernels("avx512", "float32").failures
    assert len(failed) == 2 and all("wanted cpu avx512 alone" in line for line in failed), failed


@compiled
def test_wrong_losses_and_other_bits_fail(small, monkeypatch):
    right, noise = ops.linear_kl_div, cpu.noise.noise_
    monkeypatch.setattr(ops, "linear_kl_div", lambda *inputs, **options: right(*inputs, **options) * 1.02)

    def other(segments, *rest):
        noise(segments, *rest)
        segments[0].tensor[-1] += 1

    monkeypatch.setattr(cpu.noise, "noise_", other)
    cell = matrix.by_kernels("plain", "bfloat16")
    assert {line.split()[0] for line in cell.failures} == {"forward,", "noise"} and not cell.noise
    for part in (
        "error of the gradient 0.02",
        "error of the loss 0.02",
        "chunk",
        "recompute",
        "noise normal bfloat16 stochastic: got",
    ):
        assert any(part in line for line in cell.failures), part
    assert cell.shown().startswith("**FAILED** ") and cell.shown().endswith("OTHER BITS")


@pytest.mark.parametrize(
    ("dtype", "kl", "loss", "gradient", "failing"),
    [
        ("float32", 0.1, 1e-6, 9e-5, []),
        ("float32", 0.1, 1e-6, 2e-4, ["gradient"]),
        ("float32", 1e-5, 1e-6, 2e-3, []),
        ("bfloat16", 0.1, 2e-3, 9e-3, ["loss"]),
        ("float16", 0.1, math.nan, math.inf, ["gradient", "loss"]),
    ],
)
def test_a_case_is_held_to_the_limits_of_the_contract(dtype, kl, loss, gradient, failing):
    cell = Cell()
    cell.judge("case", dtype, kl, loss, gradient)
    cell.judge("next", dtype, kl, 0.0, 0.0)
    assert [line.split("the ")[1].split()[0] for line in cell.failures] == failing
    assert all(line.startswith("case, KL") for line in cell.failures)
    assert f"{cell.loss} {cell.gradient}" == f"{loss} {gradient}", "a NaN stays"


def test_one_gradient_that_is_not_a_number_is_not_hidden_by_the_others():
    near = Near(1.0, torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2), [torch.ones(2, 2).double()] * 2)
    for bad in range(2):
        scales = [float("nan") if index == bad else 1.0 for index in range(2)]
        _, gradient = near.errors(lambda h, w, scales=scales: scales[0] * h.sum() + scales[1] * w.sum())
        assert math.isnan(gradient)


def test_the_table_shows_what_is_absent_and_names_what_failed(monkeypatch, capsys, tmp_path):
    bad = {f"{dtype}, {count}": Cell(0.01, 1e-5, True) for dtype in matrix.DTYPES for count in (1, 2)}
    lines = [Line("avx2", bad), Line("amx", absent="not at hand: this processor has avx2")]
    monkeypatch.setattr(matrix, "environment_rows", lambda *arguments: iter(lines))
    monkeypatch.setattr(matrix, "arm_rows", lambda threads: iter([]))
    page = tmp_path / "page.md"
    asked = ["--threads", "1", "2", "--path", "elsewhere", "--out", str(page)]
    assert matrix.main("", asked) == 0
    printed = capsys.readouterr().out
    assert printed.count("| amx |") == 1
    assert "| avx2 | 1 % · 1e-5 · same |" in printed and "| amx | not at hand: this processor has avx2 | –" in printed
    bad["float16, 2"].failures.append("reverse, chunk: error")
    assert matrix.main("", asked) == 1
    assert "avx2; float16, 2: reverse, chunk: error" in capsys.readouterr().out
    assert page.read_text().count("| avx2 |") == 1, "a processor's section is replaced"
    page.write_text(
        page.read_text().replace(matrix.SAID, "an earlier introduction").replace("## ", "## Other\n\nits table\n\n## ")
    )
    matrix.main("", asked)
    assert page.read_text().count(matrix.SAID) == 1 and "## Other\n\nits table" in page.read_text()


def test_an_interpreter_without_the_kernels_is_named():
    with pytest.raises(SystemExit, match=r"^false: cannot import undo_kernels"):
        list(matrix.environment_rows(["false"], "", [1]))


def test_arm_cells_come_from_the_program_s_lines():
    noise = "".join(f"noise {name} {bits}\n" for name, bits in KNOWN.items())
    output = f"{noise}loss neon 1e-05 gradient 0.0002\nloss plain 1 gradient 1\nproduct bfmmla 0.001\nchecked neon\n"
    cells = matrix.arm_cells(output, True, 2, ["bfmmla"])
    assert cells["float32, 2"] == Cell(0.0002, 1e-05, True) and cells["bfloat16, 2"] == Cell(0.001, None, True)
    assert cells["float16, 2"] == Cell(None, None, True)
    wrong = matrix.arm_cells(output.replace(KNOWN["normal float16"], "0" * 16), False, 2, ["bfmmla"])
    assert len(wrong["float16, 2"].failures) == 2 and len(wrong["float32, 2"].failures) == 1
    nothing = matrix.arm_cells("", True, 2, ["bfmmla"])
    assert nothing["float32, 2"].failures == ["losses: neon did not run", "noise: got nothing, wanted the known bits"]
    assert nothing["bfloat16, 2"].failures[0] == "product: [] ran, wanted ['bfmmla']"
    assert matrix.arm_cells(output, True, 2, [])["bfloat16, 2"].failures == ["product: ['bfmmla'] ran, wanted []"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_known_answers_of_the_noise_are_the_reference_s(dtype):
    found = digests(dtype, reference.noise.noise_)
    assert found and found == {name: KNOWN[name] for name in found}


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_the_program_for_arm_compiles_here():
    """``make test-arm`` needs a cross compiler, so that a change of ``csrc/`` could leave its program behind unseen."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fsyntax-only", "-Icsrc", "tests/cpp/kernels.cpp"]
    subprocess.run(command, cwd=ROOT, check=True)
