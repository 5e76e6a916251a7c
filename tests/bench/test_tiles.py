"""The tiles in the code are the measured ones, and the tuner rejects invalid tiles."""

import importlib
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from undo_kernels.triton import measured_tiles, tile_table, tuner

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
KEY = ("sm_90", "loss", False, 768)


@pytest.fixture
def tiles(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("tiles")


def recorded(path, seconds):
    tried = [{"tile": list(tile), "seconds": taken} for tile, taken in seconds.items()]
    tried.append({"tile": [1, 1, 1, 1, 1, 1], "failed": "spills"})
    result = {"target": "sm_90", "kernel": "loss", "wide": False, "width": 768, "tried": tried}
    path.write_text(json.dumps({"parts": {"tests": [{"id": "y"}], "tune": [{"id": "x", "result": result}, {"id": "skipped"}]}}))
    return path


def test_the_table_in_code_is_what_the_results_say(tiles):
    assert tiles.main(["--check"]) == 0


def test_the_fastest_that_compiles_wins_over_all_gpus(tiles, tmp_path):
    a, b, c = (64, 128, 64, 8, 3, 4), (128, 128, 64, 8, 3, 8), (64, 256, 64, 8, 3, 4)
    paths = [recorded(tmp_path / "h100.json", {a: 1.0, b: 1.1, c: 0.5}), recorded(tmp_path / "h200.json", {a: 1.5, b: 1.0})]
    found = tiles.measured(paths)
    assert tiles.table(found, lambda key, tile: True) == {KEY: b}
    assert tiles.table(found, lambda key, tile: tile != b) == {KEY: a}
    assert tiles.table(found, lambda key, tile: False) == {}
    text = tiles.source({KEY: b})
    scope: dict[str, Any] = {}
    exec(text, scope)
    assert scope["MEASURED"] == {KEY: b} and scope["__doc__"] == measured_tiles.__doc__


def test_a_candidate_that_does_not_compile_for_its_target_is_passed_over(tiles):
    assert not tiles.compiles(KEY, (64, 96, 64, 8, 3, 4))  # no power of two


def test_the_width_finds_its_tile(monkeypatch):
    small, large = (64, 128, 64, 4, 3, 4), (128, 128, 64, 8, 3, 8)
    monkeypatch.setattr(tile_table, "MEASURED", {("sm_90", "loss", False, 320): small, ("sm_90", "loss", False, 2304): large})
    found = [astuple(tile_table.tile("sm_90", "loss", False, width)) for width in (64, 320, 321, 2304, 9000)]
    assert found == [small, small, large, large, large]
    assert {astuple(tile) for tile in tile_table.tiles("sm_90", "loss", False)} == {small, large}
    assert tile_table.tile("sm_90", "stats", False, 320) == tile_table.tiles("sm_90", "stats", False)[0]  # nothing measured


@pytest.mark.parametrize("target", tile_table.TARGETS)
@pytest.mark.parametrize("wide", [False, True])
def test_there_are_candidates_and_not_too_many(target, wide):
    found = list(tuner.candidates(target, wide))
    assert 8 <= len(found) <= 80 and len(set(found)) == len(found)
    assert all(value & (value - 1) == 0 for tile in found for value in (tile.block_t, tile.block_v, tile.block_d, tile.warps))


def on_cpu(kernel, seconds, **options):
    arguments = {"tokens": 3, "vocabulary": 70, **options}
    return tuner.tune(kernel, False, 32, torch.device("cpu"), seconds, **arguments)


@pytest.mark.parametrize("kernel", ["stats", "jsd"])
def test_the_tuner_takes_the_fastest(kernel, monkeypatch):
    monkeypatch.setattr(tile_table, "target_of", lambda device: tile_table.INTERPRETER)
    clock = iter((2.0, 1.0))
    before = dict(tile_table.MEASURED)
    found = on_cpu(kernel, lambda step: next(clock))
    assert found["default"] == [16, 64, 16, 4, 1, 2] and found["best"] == [16, 32, 16, 4, 1, 2]
    assert [tried["seconds"] for tried in found["tried"]] == [2.0, 1.0]
    assert all(tried["error"] < 1e-2 for tried in found["tried"])
    assert before == tile_table.MEASURED
    (only,) = on_cpu(kernel, pytest.fail, first=True, share=(1, 2))["tried"]
    assert only["tile"] == [16, 32, 16, 4, 1, 2] and "seconds" not in only


def test_the_tuner_takes_no_candidate_that_is_wrong_or_fails(monkeypatch):
    real = tuner.launcher

    def spoiled(p, kernel):
        launch, written = real(p, kernel)
        tile = tile_table.tile(tile_table.INTERPRETER, "loss", False, 32)
        if tile.block_v == 32:
            return launch, lambda: written() * torch.nan
        return launch, written

    monkeypatch.setattr(tuner, "launcher", spoiled)
    found = on_cpu("loss", lambda step: 1.0)
    assert found["best"] == [16, 64, 16, 4, 1, 2]
    assert found["tried"][1]["failed"] == "other numbers than the default tile's"

    def refuses(step):
        raise RuntimeError("out of resource: shared memory\nmore")

    found = on_cpu("stats", refuses)
    assert found["best"] is None and found["tried"][0]["failed"] == "RuntimeError: out of resource: shared memory"

    def refused(step):
        raise triton.runtime.errors.PTXASError("Internal Triton PTX codegen error\nmore")  # which is no RuntimeError

    found = on_cpu("stats", refused)
    assert found["best"] is None and found["tried"][0]["failed"].startswith("PTXASError: ")
