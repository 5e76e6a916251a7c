"""Ahead-of-time compilation of every kernel variant, for targets that this machine need not have.

``python -m undo_kernels.triton.aot sm_90 [all]`` compiles each kernel with every option on (or in every form that is launched)
and prints one JSON object per line: registers, spills and shared memory as ptxas or LLVM report them. It needs the variable
TRITON_INTERPRET unset or 0.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from undo_kernels.triton import noise, rmu, row_kernels, tile_kernels, tile_table
from undo_kernels.triton.pair_math import FORWARD, JSD, OWN, REVERSE

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_GPU = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_CODES = {"own": OWN.value, "forward": FORWARD.value, "reverse": REVERSE.value, "jsd": JSD.value}

# Types of arguments by name. The others are pointers to float32 (_ptr), float32 (in _FLOATS) or int32.
_FLOATS = {"inner", "outer", "inner_s", "outer_s", "inner_t", "outer_t", "beta_t", "beta_s", "filter_below"}
_FLOATS |= {"coefficient", "even_factor"}
_POINTERS = {"counted_ptr": "*u8", "labels_ptr": "*i64", "index_ptr": "*i64", "table_ptr": "*i64", "sums_ptr": "*fp64"}
# Arguments that are multiples of 16 in practice, for which Triton specialises: strides and lengths of padded buffers.
_ALIGNED = re.compile(r"stride_(s|t|z|dz|hidden.*|weight.*)$|part$|vocabulary$|columns$|last$|begin$|width.*$")


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        name: description in the report.
        kernel: the jitted function.
        types: types of pointers that are not to float32.
        constants: constexpr arguments.
        warps: num_warps of the launch.
        stages: num_stages of the launch.
        matrix_16: whether it multiplies 16-bit matrices.
        aligned: whether pointers, strides and lengths are multiples of 16.
        ones: whether every integer argument is 1, which Triton makes a constant.
        fused: whether products and sums may be contracted.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    matrix_16: bool = False
    aligned: bool = True
    ones: bool = False
    fused: bool = True


_PLAIN = {"BIAS_S": False, "CAPPED_S": False, "BIAS_T": False, "CAPPED_T": False, "MASKED": False}
_FULL = {"BIAS_S": True, "CAPPED_S": True, "BIAS_T": True, "CAPPED_T": True, "MASKED": True}


def variants(target: str, every: bool) -> Iterator[Variant]:
    """Yields a target's variants: each kernel with every option on; ``every``: each divergence, and options off too."""
    for variant in _row_variants(target, every):
        yield variant
        if every:
            yield replace(variant, name=f"{variant.name} of ones", ones=True)
    yield from _noise_variants(target, every)
    for variant in _rmu_variants(every):
        yield variant
        if every:
            yield replace(variant, name=f"{variant.name} of ones", ones=True)
    for wide, kernel in itertools.product((False, True), tile_table.KERNELS):
        for tile in tile_table.tiles(target, kernel, wide):
            for variant in _tile_variants(target, kernel, wide, tile, every):
                yield variant
                if every and not wide:
                    yield replace(variant, name=f"{variant.name} of ones", ones=True)


def _row_variants(target: str, every: bool) -> Iterator[Variant]:
    row = tile_table.row_block(target, 1 << 18)
    block = {"BLOCK_V": row.block_v}
    stats = {"TEACHER": True, "CROSS": True, "STATISTICS": True, "HOLES": False}
    yield Variant("stats_rows", row_kernels.stats_rows, {}, {**stats, **_FULL, **block}, row.warps)
    if every:
        yield Variant(
            "stats_rows plain",
            row_kernels.stats_rows,
            {},
            {**stats, "CROSS": False, "STATISTICS": False, **_PLAIN, **block},
            row.warps,
        )
        given = {"z_s_ptr": "*bf16", "z_t_ptr": "*bf16"}
        yield Variant("stats_rows given", row_kernels.stats_rows, given, {**stats, **_PLAIN, **block}, row.warps, aligned=False)
    combine = {
        "STUDENT": True, "TEACHER": True, "CROSS": True, "STATISTICS": True, "DIFFERENCES": True, "LESS_ONE": False,
        "PAIR": True, "UNIFORM": False, "NLL": True, "LABELS": True, "MASKED": True, "BLOCK_P": 64,
    }  # fmt: skip
    yield Variant("combine_rows", row_kernels.combine_rows, {}, combine, 1)
    if every:
        yield Variant("combine_rows tiles", row_kernels.combine_rows, {}, combine | {"DIFFERENCES": False, "LESS_ONE": True}, 1)
        sparse = combine | {
            "TEACHER": False,
            "CROSS": False,
            "STATISTICS": False,
            "DIFFERENCES": False,
            "PAIR": False,
            "NLL": False,
        }
        yield Variant("combine_rows sparse", row_kernels.combine_rows, {"lse_s_ptr": "*fp64"}, sparse, 1)
        uniform = combine | {
            "TEACHER": False,
            "CROSS": False,
            "STATISTICS": False,
            "DIFFERENCES": False,
            "UNIFORM": True,
            "STUDENT": False,
        }
        yield Variant("combine_rows uniform", row_kernels.combine_rows, {}, uniform, 1)
    for name, code in _CODES.items():
        flags = {
            "TARGET": code,
            "UNIFORM": False,
            "GRADIENT": True,
            "NLL": True,
            "LABELS": True,
            "FILTER": True,
            "HOLES": name == "own",
        }
        yield Variant(f"loss_rows {name}", row_kernels.loss_rows, {"dz_ptr": "*bf16"}, {**flags, **_FULL, **block}, row.warps)
        if every:
            plain = flags | {"NLL": False, "LABELS": False, "FILTER": False, "UNIFORM": name == "forward", "HOLES": False}
            plain["NLL"] = name == "own"
            yield Variant(
                f"loss_rows {name} plain", row_kernels.loss_rows, {"dz_ptr": "*fp16"}, {**plain, **_PLAIN, **block}, row.warps
            )
            forward = plain | {"GRADIENT": False, "NLL": False}
            yield Variant(
                f"loss_rows {name} forward", row_kernels.loss_rows, {}, {**forward, **_PLAIN, **block}, row.warps, aligned=False
            )
    flags = {
        "TARGET": FORWARD.value,
        "UNIFORM": False,
        "GRADIENT": True,
        "NLL": True,
        "LABELS": True,
        "FILTER": False,
        "HOLES": False,
    }
    for kind in ("fp32", "bf16"):
        types = dict.fromkeys(("z_s_ptr", "z_t_ptr", "dz_ptr"), f"*{kind}")
        yield Variant(f"loss_rows inplace {kind}", row_kernels.loss_rows, types, {**flags, **_PLAIN, **block}, row.warps)
        if every:
            name = f"loss_rows inplace unaligned {kind}"
            yield Variant(name, row_kernels.loss_rows, types, {**flags, **_PLAIN, **block}, row.warps, aligned=False)
    pick = {"HAS_BIAS": True, "CAPPED": True, "MASKED": True, "TAKE": True, "BLOCK_K": 128}
    yield Variant("pick_rows", row_kernels.pick_rows, {}, pick, 1)
    yield Variant("put_rows", row_kernels.put_rows, {"dz_ptr": "*bf16"}, {"MASKED": True, "BLOCK_K": 128}, 1)
    labels = {"HAS_BIAS": True, "CAPPED": True, "BLOCK_D": 256}
    matrices = {"hidden_ptr": "*bf16", "weight_ptr": "*bf16"}
    yield Variant("pick_labels", tile_kernels.pick_labels, matrices, labels, 1)


def _noise_variants(target: str, every: bool) -> Iterator[Variant]:
    for dtype, stochastic in itertools.product(noise.DTYPES.values(), (True, False)):
        narrow, wide = dtype in ("bfloat16", "float16"), dtype == "float64"
        if (stochastic and not narrow) or (not every and (dtype not in ("bfloat16", "float32") or narrow != stochastic)):
            continue
        flags = {"DTYPE": dtype, "STOCHASTIC": stochastic, "BLOCK": noise.BLOCK, "BLOCKS": noise.BLOCKS}
        name = f"noise_blocks {dtype}" + (" stochastic" if stochastic else "")
        types = {"partial_ptr": "*fp64"} if wide else {}
        yield Variant(name, noise.noise_blocks, types, flags, noise.warps(target), 1, fused=False)
    for wide in (False, True) if every else (False,):
        types = {"partial_ptr": "*fp64"} if wide else {}
        flags = {"WIDE": wide, "BLOCK_P": noise.BLOCK_P}
        yield Variant(
            f"noise_sums {'fp64' if wide else 'fp32'}", noise.noise_sums, types, flags, noise.warps(target), 1, fused=False
        )


def _rmu_variants(every: bool) -> Iterator[Variant]:
    full = {"FACTOR": True, "OWN_TARGET": True, "GRADIENT": True, "BLOCK_D": rmu.BLOCK_D}
    for kind in ("fp32", "bf16", "fp16"):
        types = {"hidden_ptr": f"*{kind}", "target_ptr": f"*{kind}", "gradient_ptr": "*fp32" if kind == "fp16" else f"*{kind}"}
        yield Variant(f"rmu_rows {kind}", rmu.rmu_rows, types, full, rmu.WARPS)
        if every:
            for flags in itertools.product((False, True), repeat=3):
                constants = {**full, **dict(zip(("FACTOR", "OWN_TARGET", "GRADIENT"), flags, strict=True))}
                given = types if flags[1] else types | {"target_ptr": "*fp32"}
                name = f"rmu_rows {kind} {''.join('-+'[flag] for flag in flags)}"
                yield Variant(name, rmu.rmu_rows, given, constants, rmu.WARPS, aligned=False)


def _tile_variants(target: str, kernel: str, wide: bool, tile: tile_table.Tile, every: bool) -> Iterator[Variant]:
    kind = "fp32" if wide else "bf16"
    stats = kernel in ("stats", "cross")
    names = ("hidden_s_ptr", "weight_s_ptr", "hidden_t_ptr", "weight_t_ptr") + (() if stats else ("dz_ptr",))
    types = {name: f"*{kind}" for name in names}
    common = {
        "EVEN_S": False, "EVEN_T": True, "PRECISION": tile_table.precision(target, wide),
        "BLOCK_T": tile.block_t, "BLOCK_V": tile.block_v, "BLOCK_D": tile.block_d, "PIECES": tile.pieces,
    }  # fmt: skip
    label = f"{tile.block_t}x{tile.block_v}x{tile.block_d} {tile.warps} warps {tile.stages} stages {kind}"
    options = (tile.warps, tile.stages, not wide)
    heads = {k: v for k, v in _FULL.items() if k != "MASKED"}
    bare = {k: v for k, v in _PLAIN.items() if k != "MASKED"} | {"EVEN_S": True, "LABELS": False}
    if stats:
        crossed = kernel == "cross"
        flags = {"TEACHER": True, "CROSS": crossed, "STATISTICS": crossed, "LABELS": True}
        yield Variant(f"stats_tiles {kernel} {label}", tile_kernels.stats_tiles, types, common | flags | heads, *options)
        if every:
            for name, more in (("plain", {}), ("known", {"TEACHER": False}), ("statistics", {"CROSS": False})):
                both = common | flags | bare | (more if crossed == (name == "statistics") or name == "plain" else {})
                yield Variant(f"stats_tiles {kernel} {name} {label}", tile_kernels.stats_tiles, types, both, *options)
        return
    for name, code in _CODES.items():
        if kernel == "loss" and name == "jsd":  # jsd has the filter's tile with and without one
            continue
        if not every and name != ("reverse" if kernel == "loss" else "jsd"):  # the one that needs the most registers
            continue
        flags = {"TARGET": code, "UNIFORM": False, "GRADIENT": True, "NLL": True, "LABELS": True, "FILTER": kernel == "filter"}
        yield Variant(f"loss_tiles {kernel} {name} {label}", tile_kernels.loss_tiles, types, common | flags | _FULL, *options)
        if every:
            flags |= {"NLL": name == "own", "LABELS": False, "FILTER": False} | {"EVEN_S": True}
            yield Variant(
                f"loss_tiles {kernel} {name} plain {label}", tile_kernels.loss_tiles, types, common | flags | _PLAIN, *options
            )
            if name == "own":  # nothing is launched without a gradient
                continue
            flags |= {"GRADIENT": False, "NLL": False}
            yield Variant(
                f"loss_tiles {kernel} {name} forward {label}", tile_kernels.loss_tiles, types, common | flags | _PLAIN, *options
            )


def compile_variant(variant: Variant, target: str) -> dict[str, Any]:
    """Compiles and measures one variant."""
    kernel = variant.kernel
    signature, constants, attributes = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in variant.constants:
            signature[name] = "constexpr"
            constants[(number,)] = variant.constants[name]
        elif name.endswith("_ptr"):
            signature[name] = variant.types.get(name, _POINTERS.get(name, "*fp32"))
        elif name in _FLOATS:
            signature[name] = "fp32"
        elif variant.ones:
            signature[name] = "constexpr"
            constants[(number,)] = 1
        else:
            signature[name] = "i32"
        divisible = name.endswith("_ptr") or (_ALIGNED.search(name) and name not in _FLOATS)
        if signature[name] != "constexpr" and divisible and variant.aligned:
            attributes[(number,)] = [["tt.divisibility", 16]]
    missing = set(variant.constants) - set(kernel.arg_names)
    if missing:
        raise ValueError(f"{variant.name}: no such arguments: {sorted(missing)}")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": variant.fused}
    compiled = triton.compile(source, target=_GPU[target], options=options)
    report = {"name": variant.name, "target": target, "shared": compiled.metadata.shared, "matrix_16": variant.matrix_16}
    if " inplace " in variant.name:
        report["layouts"] = _layouts(compiled.asm["ttgir"], variant)
    if not variant.fused and target != "gfx942":
        report |= _roundings(compiled.asm["ptx"])
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        report["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        report["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        report["spills"] += int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])
        return report
    report |= _resources(compiled.asm["cubin"])
    report["wgmma"] = "wgmma" in compiled.asm["ptx"]
    report["tcgen05"] = "tcgen05.mma" in compiled.asm["ptx"]
    return report


def _layouts(module: str, variant: Variant) -> list[str]:
    """Returns the layouts of the logits read and the gradient written: a thread may overwrite only what it read itself."""
    kind = variant.types["dz_ptr"].replace("*fp", "f").replace("*", "")
    pattern = rf"tt\.(?:load|store) .*?tensor<{variant.constants['BLOCK_V']}x!tt\.ptr<{kind}>, (#\w+)>"
    return sorted(set(re.findall(pattern, module)))


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


def _resources(cubin: bytes) -> dict[str, int]:
    """Returns registers and local memory, which holds spills and arrays that did not fit registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def main(target: str, every: bool) -> None:
    """Prints a line for each variant."""
    for variant in variants(target, every):
        print(json.dumps(compile_variant(variant, target)), flush=True)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        sys.exit("TRITON_INTERPRET: got 1, wanted 0: interpreted kernels cannot be compiled")
    main(sys.argv[1], "all" in sys.argv[2:])
