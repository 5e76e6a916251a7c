"""Ahead-of-time compilation of every form that is launched, for targets that this machine need not have.

``python -m undo_kernels.triton.aot sm_90 [main|few|typical|all]`` compiles forms of each kernel, see ``forms.py``, and prints one JSON
object per line: registers, spills, shared memory, and the instructions per pair that ``sass.py`` counts. It needs the
variable TRITON_INTERPRET unset or 0. A form that does not compile is a line with ``error``. Triton's cache keeps the compiled code,
and the counts beside it, so that a form is compiled once as long as its source is the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

from undo_kernels.triton import sass, tile_table
from undo_kernels.triton.forms import Form, compiling_for, forms
from undo_kernels.triton.tile_table import Tile

PAIR_KERNELS = ("stats_rows", "loss_rows", "stats_tiles", "loss_tiles")  # that process (token, vocabulary entry) pairs
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


def report(form: Form, target: str, counted: bool = True) -> dict[str, Any]:
    """Compiles and measures one form; ``counted``: its instructions too, whose disassembly takes half a second."""
    compiled = form.compile()
    found = {"name": form.name, "target": target, "triton": triton.__version__, "shared": compiled.metadata.shared}
    found["matrix_16"] = form.kernel.__name__.endswith("_tiles") and "fp32" not in form.types.get("student.hidden_ptr", "fp32")
    if _over_logits(form):
        kind = form.types["dz_ptr"].replace("fp", "f")
        found["layouts"] = layouts(compiled.asm["ttgir"], form.constants["BLOCK_V"], kind)
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
    if counted:
        found |= _counts(compiled.asm["cubin"], form.elements / form.threads)
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


def _over_logits(form: Form) -> bool:
    """Returns whether a form may write its gradient over the logits: both have one dtype and, for the compiler, one stride."""
    if form.kernel.__name__ != "loss_rows" or not form.constants["GRADIENT"]:
        return False
    named = dict(zip(form.kernel.arg_names, form.arguments, strict=False))  # what is behind them is passed by name
    read, written = ((stride == 1, stride % 16 == 0) for stride in (named["student"].stride, named["stride_dz"]))
    return form.types["student.z_ptr"] == form.types["dz_ptr"] and read == written


def layouts(module: str, size: int, kind: str) -> dict[str, list[str]]:
    """Returns the layouts in which blocks of a dtype are read, and those in which computed ones are written.

    A thread may overwrite only what it read itself. Constants, zeros for masked tokens and for columns past the vocabulary, are
    written where no logits are read.
    """
    pointers, block = rf"tensor<{size}x!tt\.ptr<{kind}>, (#\w+)>", rf"tensor<{size}x{kind}, (#\w+)>"
    patterns = {  # of AMD's buffers: a pointer and 32-bit offsets
        "read": (rf"tt\.load .*?{pointers}", rf"amdg\.buffer_load .*?{block}"),
        "written": (rf"tt\.store %\w+, %(?!cst)\w+.*?{pointers}", rf"amdg\.buffer_store %(?!cst)\w+.*?{block}"),
    }
    return {way: sorted({layout for p in both for layout in re.findall(p, module)}) for way, both in patterns.items()}


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


def _counts(cubin: bytes, elements: float) -> dict[str, float]:
    """Returns what ``sass.counts`` counts; disassembling takes longer than compiling a short kernel, so counts are kept."""
    said = hashlib.sha256(Path(sass.__file__).read_bytes() + cubin + str(elements).encode()).hexdigest()
    kept = get_cache_manager(said)
    file = kept.get_file("counts.json")
    if file is None:
        file = kept.put(json.dumps(sass.counts(sass.disassemble(cubin), elements)), "counts.json", binary=False)
    return json.loads(Path(file).read_text())


def compiled(targets: Iterable[str], scope: str, processes: int = 2, counted: bool = True) -> dict[str, list[dict[str, Any]]]:
    """Returns the reports of each target's forms, from so many processes in which no kernel is interpreted.

    ``counted``: with their instructions, of ``few`` the kernels' that process pairs: disassembling takes half a second a form.
    """

    def share(number: int) -> list[dict[str, Any]]:
        command = [sys.executable, "-W", "ignore", "-m", __spec__.name, ",".join(targets), scope, f"{number}/{processes}"]
        command += [] if counted else ["uncounted"]
        environment = os.environ | {"TRITON_INTERPRET": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"aot: got exit status {done.returncode} of {' '.join(command)}, wanted 0\n{done.stderr[-4000:]}"
            )
        return [json.loads(line) for line in done.stdout.splitlines()]

    targets = list(targets)
    with ThreadPoolExecutor(processes) as pool:
        found = [line for lines in pool.map(share, range(processes)) for line in lines]
    found.sort(key=lambda line: line["number"])
    return {target: [line for line in found if line["target"] == target] for target in targets}


def main(targets: str, scope: str = "typical", share: str = "0/1", counted: str = "counted") -> None:
    """Prints a line for each form of a share of them; forms that differ only in the alignment of arguments are numbered."""
    first, every = map(int, share.split("/"))
    for target in targets.split(","):
        seen = Counter[str]()
        chosen = forms(target, scope)
        with compiling_for(target):
            for number, form in enumerate(chosen):
                seen[form.name] += 1
                if number % every != first:
                    continue
                name = form.name + (f" #{seen[form.name]}" if seen[form.name] > 1 else "")
                wanted = counted == "counted" and (scope != "few" or form.kernel.__name__ in PAIR_KERNELS)
                try:
                    found = report(form, target, wanted)
                except Exception as error:  # of Triton, LLVM or ptxas, which share no class; the other forms go on
                    found = {"error": f"{type(error).__name__}: {error}"[-2000:]}
                print(json.dumps(found | {"name": name, "target": target, "number": number}), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET: got 1, wanted 0: interpreted kernels cannot be compiled")
    main(*sys.argv[1:])
