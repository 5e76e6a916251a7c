"""The page on several GPUs shows what the command prints, and its numbers follow from first principles."""

from pathlib import Path

import pytest
import several_gpus

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "several-gpus.md"


def test_the_page_holds_the_printed_tables():
    assert f"<!-- ranks -->\n\n{several_gpus.tables()}\n\n<!-- /ranks -->" in PAGE.read_text()


def test_a_step_by_hand():
    """Every parameter of Gemma-2-2B: gathered twice by the student, once by the teacher, reduced once; the root once less."""
    parameters, root = 2_614_341_888, 256_000 * 2304 + 2304
    found = several_gpus.step("Gemma-2-2B", 8, "whole")
    assert found.fsdp == pytest.approx(7 / 8 * (parameters * (2 + 2 + 4 + 2) - root * 2), rel=1e-4) and found.head == 0
    assert found.state == pytest.approx(18 * parameters / 8, rel=1e-4)
    shared = several_gpus.step("Gemma-2-2B", 8, "8 parts")
    tokens = 8 * several_gpus.TOKENS
    assert shared.fsdp == 0 and shared.head == 2 * 7 / 8 * tokens * (16 + 48 + 8 + 4 * 2304 + 2 * 2 * 2304)
    assert several_gpus.step("Gemma-2-2B", 1, "whole").wire == 0


def test_a_ring_over_machines_uses_the_adapters_of_its_gpus():
    assert (
        several_gpus._rate(False, 1) == 0.8 * 450e9
        and several_gpus._rate(True, 1) == 0.8 * 400e9
        and several_gpus._rate(True, 8) == 0.8 * 50e9
    )
