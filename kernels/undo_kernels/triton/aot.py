"""Ahead-of-time compilation of every form that is launched, for targets that this machine need not have.

``python -m undo_kernels.triton.aot sm_90 [few|typical|all]`` compiles forms of each kernel, see ``forms.py``, and prints one JSON
object per line: registers, spills, shared memory, and the instructions per pair that ``sass.py`` counts. It needs the
variable TRITON_INTERPRET unset or 0.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from typing import Any

import triton

from undo_kernels.triton import sass, tile_table
from undo_kernels.triton.forms import Form, compiling_for, forms
from undo_kernels.triton.tile_table import Tile

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def report(form: Form, target: str) -> dict[str, Any]:
    """Compiles and measures one form."""
    compiled = form.compile()
    found = {"name": form.name, "target": target, "triton": triton.__version__, "shared": compiled.metadata.shared}
    found["matrix_16"] = form.kernel.__name__.endswith("_tiles") and "fp32" not in form.types.get("student.hidden_ptr", "fp32")
    if (
        form.kernel.__name__ == "loss_rows"
        and form.types["student.z_ptr"] == form.types["dz_ptr"]
        and form.constants["GRADIENT"]
    ):
        found["layouts"] = _layouts(compiled.asm["ttgir"], form)
    if form.kernel.__name__ == "loss_rows":
        found["subtracts_logits"] = _subtracts_logits(compiled.asm["ttir"])
    if form.kernel.__name__.startswith("noise") and "ptx" in compiled.asm:
        found |= _roundings(compiled.asm["ptx"])
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        found["spills"] += int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
        return found
    found |= sass.resources(compiled.asm["cubin"])
    found |= sass.counts(sass.disassemble(compiled.asm["cubin"]), form.elements / form.threads)
    found["wgmma"] = "wgmma" in compiled.asm["ptx"]
    found["tcgen05"] = "tcgen05.mma" in compiled.asm["ptx"]
    return found


def tile_reports(target: str, kernel: str, wide: bool, tile: Tile) -> list[dict[str, Any]]:
    """Compiles and measures the heaviest forms of a matrix kernel (as the tile table names it) with a tile."""
    name = "stats_tiles" if kernel in ("stats", "cross") else "loss_tiles"
    sizes = {"BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "PIECES": tile.pieces}
    operand = "fp32" if wide else "bf16"
    with tile_table.trial((target, kernel, wide, 1), tile):
        chosen = [f for f in forms(target, "typical") if f.kernel.__name__ == name and sizes.items() <= f.constants.items()]
    with compiling_for(target):
        return [report(form, target) for form in chosen if form.types["student.hidden_ptr"] == operand]


def _layouts(module: str, form: Form) -> list[str]:
    """Returns the layouts of the logits read and the gradient written: a thread may overwrite only what it read itself."""
    kind = form.types["dz_ptr"].replace("fp", "f")
    size = form.constants["BLOCK_V"]
    pattern = rf"tt\.(?:load|store) .*?tensor<{size}x!tt\.ptr<{kind}>, (#\w+)>"
    on_amd = rf"amdg\.buffer_(?:load|store) .*?tensor<{size}x{kind}, (#\w+)>"  # of a pointer and 32-bit offsets
    return sorted(set(re.findall(pattern, module) + re.findall(on_amd, module)))


def _subtracts_logits(module: str) -> bool:
    """Returns whether two loaded tensors are subtracted as they are.

    A difference of two products would be contracted to a fused multiply-add, and differ from 0 where the tensors are the same.
    """
    loaded = set(re.findall(r"(%\w+) = tt\.load ", module))
    loaded |= {to for to, of in re.findall(r"(%\w+) = arith\.extf (%\w+) ", module) if of in loaded}
    return any(loaded >= {a, b} and a != b for a, b in re.findall(r"arith\.subf (%\w+), (%\w+) .*: tensor<", module))


def _roundings(ptx: str) -> dict[str, int]:
    """Counts fused multiply-adds, those that add a square, and 16-byte memory accesses."""
    fused = re.findall(r"\bfma\.\S+\s+[^,]+, ([^,]+), ([^,]+),", ptx)
    wide = {way: len(re.findall(rf"\b{way}\.global\.(?:v4\.[bf]32|v2\.[bf]64)\b", ptx)) for way in ("ld", "st")}
    return {
        "fused": len(fused),
        "fused_squares": sum(a == b for a, b in fused),
        "loads_16": wide["ld"],
        "stores_16": wide["st"],
    }


def main(target: str, scope: str) -> None:
    """Prints a line for each form; forms that differ only in the alignment of their arguments are numbered."""
    seen = Counter[str]()
    chosen = forms(target, scope)
    with compiling_for(target):
        for form in chosen:
            found = report(form, target)
            seen[form.name] += 1
            if seen[form.name] > 1:
                found["name"] += f" #{seen[form.name]}"
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET: got 1, wanted 0: interpreted kernels cannot be compiled")
    main(sys.argv[1], *(sys.argv[2:] or ["typical"]))
