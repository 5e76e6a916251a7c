"""Tile sizes of the Triton kernels: a table by target, kernel, dtype and width.

Nothing is timed at run time, so that a run is reproducible bit for bit.

tests/undo_kernels/triton/test_aot.py compiles every entry ahead of time, and fails if registers spill or shared memory exceeds
the target's. This module can be imported without triton.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from undo_kernels.triton.measured_tiles import MEASURED


@dataclass(frozen=True)
class Tile:
    """Tile sizes and launch options of a matrix kernel."""

    block_t: int
    block_v: int
    block_d: int
    warps: int
    stages: int  # of operands loaded ahead; one fewer where a stage holds those of both sides
    pieces: int  # column groups processed one at a time after the product, so that temporaries fit registers


@dataclass(frozen=True)
class RowBlock:
    """Block size and launch options of a row kernel."""

    block_v: int
    warps: int


TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")
INTERPRETER = "interpreter"
FIELDS = 9  # number of partial sums per part of a token, see pair_math.py

# Keyed by target, kernel and whether operands are float32. "cross" is the statistics kernel with the offset of reverse KL or
# the top-1; "jsd" is the loss kernel of jsd. Both need more registers than "stats" and "loss".
KERNELS = ("stats", "cross", "loss", "jsd")
TILES: dict[tuple[str, str, bool], Tile] = {
    **{(target, kernel, False): Tile(64, 128, 64, 8, 3, 4) for target in TARGETS for kernel in KERNELS},
    **{(target, kernel, True): Tile(64, 64, 32, 8, 2, 2) for target in TARGETS for kernel in ("stats", "cross", "jsd")},
    **{(target, "loss", True): Tile(64, 128, 32, 8, 2, 4) for target in TARGETS},
    **{(target, "stats", False): Tile(128, 128, 64, 8, 3, 8) for target in ("sm_80", "sm_86")},
    **{(target, kernel, True): Tile(64, 128, 16, 8, 2, 4) for target in ("sm_80", "sm_86") for kernel in ("stats", "cross")},
    ("sm_80", "jsd", True): Tile(64, 128, 32, 8, 2, 4),
    ("sm_86", "jsd", True): Tile(64, 128, 32, 8, 2, 8),
    ("sm_86", "jsd", False): Tile(64, 128, 64, 8, 3, 8),
    **{("sm_100", kernel, False): Tile(64, 128, 64, 8, 3, 8) for kernel in ("stats", "jsd")},
    ("sm_90", "stats", False): Tile(128, 128, 64, 8, 3, 8),
    ("sm_90", "loss", False): Tile(128, 128, 64, 8, 3, 8),
    ("sm_90", "loss", True): Tile(128, 64, 32, 8, 2, 4),
    ("sm_90", "jsd", False): Tile(128, 128, 64, 8, 3, 8),
    ("sm_100", "loss", False): Tile(128, 128, 64, 8, 3, 4),
    **{("gfx942", kernel, False): Tile(128, 128, 64, 8, 2, 8) for kernel in ("stats", "loss")},
    **{("gfx942", kernel, False): Tile(64, 128, 64, 8, 2, 4) for kernel in ("cross", "jsd")},
    **{(INTERPRETER, kernel, wide): Tile(16, 64, 16, 4, 1, 2) for kernel in KERNELS for wide in (False, True)},
}
_ROWS = {
    **{target: RowBlock(1024, 4) for target in ("sm_80", "sm_86", "sm_90", "sm_100")},
    "gfx942": RowBlock(2048, 4),
    INTERPRETER: RowBlock(128, 4),
}


def target_of(device: torch.device) -> str:
    """Returns the table's name for a device."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_86")  # consumer Blackwell has the shared memory of sm_86


def tile(target: str, kernel: str, wide: bool, width: int) -> Tile:
    """Returns the tile of a matrix kernel; ``wide``: float32 operands.

    Takes the one measured at the next larger width (else at the largest), if the kernel was measured.
    """
    widths = sorted(key[3] for key in MEASURED if key[:3] == (target, kernel, wide))
    if not widths:
        return TILES[target, kernel, wide]
    return Tile(*MEASURED[target, kernel, wide, next((known for known in widths if known >= width), widths[-1])])


def tiles(target: str, kernel: str, wide: bool) -> list[Tile]:
    """Returns every tile that :func:`tile` can return, over all widths."""
    measured = [Tile(*fields) for key, fields in MEASURED.items() if key[:3] == (target, kernel, wide)]
    return list(dict.fromkeys(measured)) or [TILES[target, kernel, wide]]


@contextlib.contextmanager
def trial(key: tuple[str, str, bool, int], tile: Tile) -> Iterator[None]:
    """Makes :func:`tile` return this tile inside the block."""
    before = dict(MEASURED)
    MEASURED[key] = (tile.block_t, tile.block_v, tile.block_d, tile.warps, tile.stages, tile.pieces)
    try:
        yield
    finally:
        MEASURED.clear()
        MEASURED.update(before)


def together(target: str, exact: bool) -> bool:
    """Returns whether one loop forms the products of both sides; elsewhere the sums of two tiles leave no registers to it."""
    return target in ("sm_90", INTERPRETER) and not exact


def row_block(target: str, vocabulary: int) -> RowBlock:
    """Returns the block size and warps of the row kernels."""
    if target == INTERPRETER and vocabulary >= 256:  # its time depends on the number of operations, not of elements
        return RowBlock(256 if vocabulary < 4096 else 4096, 4)
    return _ROWS[target]


def precision(target: str, wide: bool) -> str:
    """Returns the precision of float32 products: 3xTF32 if the target has it, else IEEE; never plain TF32."""
    if target == INTERPRETER:
        return "interpreted"
    return "tf32x3" if wide and target.startswith("sm_") else "ieee"


def row_parts(tokens: int, vocabulary: int, block_v: int) -> tuple[int, int]:
    """Returns how many parts a token's logits are split into, and their length; few tokens get more parts, to occupy the GPU."""
    return _split(vocabulary, block_v, min(-(-2048 // max(tokens, 1)), 64))


def tile_parts(tokens: int, vocabulary: int, tile: Tile) -> tuple[int, int]:
    """Returns how many parts the recompute plan's statistics split the vocabulary into, and their length."""
    blocks = -(-max(tokens, 1) // tile.block_t)
    return _split(vocabulary, tile.block_v, min(-(-1056 // blocks), 256))  # 1056: eight waves of 132 multiprocessors


def _split(vocabulary: int, block: int, limit: int) -> tuple[int, int]:
    """Splits the vocabulary into at most ``limit`` parts of whole blocks."""
    blocks = max(-(-vocabulary // block), 1)  # a process may hold no entry of a sharded head
    length = -(-blocks // min(limit, blocks)) * block
    return max(-(-vocabulary // length), 1), length
