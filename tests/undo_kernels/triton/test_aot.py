"""Every Triton kernel compiled for targets that this machine need not have: no spills, shared memory within limits, wgmma.

By default the typical and heaviest forms of sm_90 and the typical ones of other targets. With ``UNDO_AOT=sm_90`` every form that is
launched there, and of other targets the heaviest too; ``UNDO_AOT=sm_90,sm_80`` names several. A form that does not compile fails
``test_every_form_compiles`` alone.
"""

import json
import os
import re
from pathlib import Path

import pytest
import triton
from undo_kernels.triton import aot, costs

EVERY = [target for target in os.environ.get("UNDO_AOT", "").split(",") if target]  # targets of which every form is compiled
TARGETS = ("sm_90", "sm_80", "sm_100", "gfx942") + (("sm_86",) if EVERY else ())
WHOLE = TARGETS if EVERY else ("sm_90",)  # targets of which every kernel is compiled
COUNTED = tuple(target for target in WHOLE if target.startswith("sm_"))
LIMIT = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of shared memory a block
RECORDED = Path(__file__).resolve().parents[3] / "bench" / "results" / "instructions"


@pytest.fixture(scope="module")
def everything():
    first, scopes, processes = (EVERY, ("all", "typical"), os.cpu_count() or 1) if EVERY else (WHOLE, ("few", "main"), 1)
    others = [target for target in TARGETS if target not in first]
    return aot.compiled(first, scopes[0], processes) | aot.compiled(others, scopes[1], processes, bool(EVERY))


@pytest.fixture(scope="module")
def reports(everything):
    return {target: [report for report in lines if "error" not in report] for target, lines in everything.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_form_compiles(everything, target):
    assert everything[target]
    assert not {report["name"]: report["error"] for report in everything[target] if "error" in report}


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills(reports, target):
    spilled = {report["name"]: report["spills"] for report in reports[target] if report["spills"]}
    assert not spilled


def recorded(version):
    """Counts that ``python bench/instructions.py`` recorded with this Triton, else with every one."""
    files = sorted(RECORDED.glob("triton-*.json"))
    counts = [json.loads(path.read_text()) for path in files]
    return [c["targets"] for c in counts if version.startswith(c["triton"])] or [c["targets"] for c in counts]


@pytest.mark.parametrize("target", sorted(set(COUNTED).intersection(*recorded(triton.__version__))))
def test_instructions_within_the_budget(reports, target):
    """At most what is recorded: an instruction a pair more is 0.06 ms at 8,192 x 256,000, a special one 0.5 ms."""
    over, known = {}, recorded(reports[target][0]["triton"])
    counted = [report for report in reports[target] if "instructions" in report]
    assert counted
    for report in counted:
        budgets = [counts[target][report["name"]] for counts in known if report["name"] in counts[target]]
        if not budgets:
            assert EVERY, f"{report['name']}: not recorded; run python bench/instructions.py"
            continue
        for field, room in (("instructions", 1.03), ("special", 1.0), ("shuffles", 1.03), ("barriers", 1.0)):
            most = max(budget[field] for budget in budgets)
            if report[field] > most * room + 0.01:
                over[report["name"], field] = (report[field], most)
    assert not over, "python bench/instructions.py records new counts"


def test_the_cost_model_counts_what_was_compiled(reports):
    """The kernels of forward KL with a softcap, as ``costs.INSTRUCTIONS`` has them."""
    names = {
        "stats_tiles capped bounded teacher same": "stats_tiles",
        "stats_tiles capped bounded same": "stats_tiles known",
        "loss_tiles forward capped bounded same gradient": "loss_tiles",
        "stats_rows capped bounded teacher same": "stats_rows",
        "loss_rows forward capped bounded same gradient": "loss_rows",
    }
    found = set()
    for report in reports["sm_90"]:
        words = re.split(r" \d", report["name"])[0]
        if words in names and "fp32 to" not in report["name"].replace("fp32 to bf16", ""):
            instructions, special = costs.INSTRUCTIONS[names[words], False]
            assert report["instructions"] == pytest.approx(instructions, rel=0.1), report["name"]
            assert report["special"] == pytest.approx(special, rel=0.1), report["name"]
            found.add(words)
    assert found == set(names)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_within_the_limit(reports, target):
    over = {report["name"]: report["shared"] for report in reports[target] if report["shared"] > LIMIT[target] << 10}
    assert not over


@pytest.mark.parametrize("target", TARGETS)
def test_a_gradient_over_its_logits_is_written_by_the_threads_that_read_them(reports, target):
    inplace = [report for report in reports[target] if "layouts" in report]
    apart = {r["name"]: r["layouts"] for r in inplace if not in_one_layout(r["layouts"])}
    assert len(inplace) >= 2
    assert not apart


def in_one_layout(layouts):
    return len(layouts["read"]) == 1 and layouts["written"] == layouts["read"]


@pytest.mark.parametrize(("written", "alike"), [("%dz, %b_out_7, %keep", False), ("%dz, %cst_0, %keep", True)])
def test_only_a_computed_gradient_has_to_be_in_the_layout_of_the_logits(written, alike):
    access = "tensor<1024x!tt.ptr<f32>, #blocked{}> loc(#loc1)"
    inside = f"%raw = tt.load %z, %keep, %cst : {access.format('')}\ntt.store %dz, %b_out, %keep : {access.format('')}"
    behind = f"tt.store {written} : {access.format(1)}"
    assert in_one_layout(aot.layouts(f"{inside}\n{behind}", 1024, "f32")) is alike
    assert not in_one_layout(aot.layouts(inside.replace("tt.store", "other.store"), 1024, "f32"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_student_that_is_its_teacher_differs_by_exactly_nothing(reports, target):
    """The loss subtracts logits before it scales them: the interpreter, which contracts nothing, cannot show the difference."""
    alike = {r["name"]: r["subtracts_logits"] for r in reports[target] if r["name"].startswith("loss_rows forward same")}
    assert len(alike) >= 2
    assert all(alike.values()), alike


@pytest.mark.parametrize("target", COUNTED)
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


@pytest.mark.parametrize("target", WHOLE)
def test_every_kernel_was_compiled(reports, target):
    kernels = {report["name"].split()[0] for report in reports[target]}
    assert kernels == {
        "stats_rows", "combine_rows", "loss_rows", "pick_rows", "put_rows", "pick_labels", "stats_tiles", "loss_tiles",
        "noise_blocks", "noise_sums", "rmu_rows",
    }  # fmt: skip


@pytest.mark.parametrize("target", WHOLE)
def test_rmu_rows_is_light_in_every_dtype(reports, target):
    found = {report["name"]: report for report in reports[target] if report["name"].startswith("rmu_rows ")}
    assert all(any(f" {kind} to" in name for name in found) for kind in ("bf16", "fp16", "fp32"))
    assert all(report["spills"] == 0 and report["registers"] <= 128 for report in found.values())
