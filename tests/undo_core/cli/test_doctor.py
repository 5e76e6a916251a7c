"""``undo doctor`` runs every op on every backend that is here, and says what does not work."""

import pytest
import undo_kernels
from undo_kernels.ops import dispatch

from undo_core import ops
from undo_core.cli import doctor
from undo_core.cli.doctor import run_doctor


def test_the_doctor_finds_this_machine_well(capsys):
    assert run_doctor() == 0
    out = capsys.readouterr().out
    assert "linear_kl_div" in out and "Everything that the pipeline needs works here." in out and "wrong" not in out


@pytest.mark.parametrize("slower", [0.4, 4.8])
def test_the_doctor_warns_of_slow_products_in_bfloat16(capsys, monkeypatch, slower):
    monkeypatch.setattr(doctor, "_CHECKS", {})
    monkeypatch.setattr(doctor, "_bfloat16_against_float32", lambda: slower)
    assert run_doctor() == 0
    assert ("WARNING torch's bfloat16 products take 4.8 times" in capsys.readouterr().out) == (slower == 4.8)


@pytest.mark.parametrize("busy", ["", "WARNING the load average is high"])
def test_the_doctor_warns_of_a_busy_machine(capsys, monkeypatch, busy):
    monkeypatch.setattr(doctor, "_CHECKS", {})
    monkeypatch.setattr(doctor, "load_warning", lambda: busy)
    assert run_doctor() == 0
    assert ("the load average" in capsys.readouterr().out) == bool(busy)


def test_the_doctor_reports_no_kernel_that_did_not_run(capsys, monkeypatch):
    """If dispatch leaves everything to plain PyTorch, the numbers are right but no kernel was checked."""
    monkeypatch.setattr(doctor, "_CHECKS", {"linear_kl_div": doctor._CHECKS["linear_kl_div"]})
    monkeypatch.setattr(dispatch, "choose_backend", lambda *arguments: "reference")
    kernels = "cpu" not in undo_kernels.unavailable()
    assert run_doctor() == int(kernels)
    assert ("PROBLEM linear_kl_div fails on the cpu backend: wrong: ran on reference" in capsys.readouterr().out) == kernels


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_the_doctor_notices_a_wrong_gradient(capsys, monkeypatch, name):
    """A fault in the gradient alone is found on each backend, since the pipeline runs on the first available one."""
    monkeypatch.setattr(doctor, "_CHECKS", {"linear_kl_div": doctor._CHECKS["linear_kl_div"]})
    right = ops.linear_kl_div

    def wrong(*arguments, **options):
        loss = right(*arguments, **options)
        return 2 * loss - loss.detach() if undo_kernels.requested_backend() == name else loss

    monkeypatch.setattr(ops, "linear_kl_div", wrong)
    here = name not in undo_kernels.unavailable()
    assert run_doctor() == int(here)
    assert (f"PROBLEM linear_kl_div fails on the {name} backend: wrong: relative" in capsys.readouterr().out) == here
