"""Predicted time of the plans' steps on an H200: matrix products, bytes of device memory, and instructions.

A step is one launch, and takes as long as the slowest of what it does::

    library product    its FLOPs, with the part of the multiprocessors that its last wave of tiles fills; its bytes
    row kernel         its bytes; instructions; special-function instructions
    tile kernel        products (FLOPs or operands from the L2 cache), then the instructions behind them: at one program a
                       multiprocessor the two do not overlap, so they are added, wave by wave

One instruction for each of 8192 x 256000 pairs is 0.063 ms, one special-function instruction 0.50 ms, one byte 0.49 ms.

``INSTRUCTIONS`` holds the counts of the compiled kernels (forward KL with softcap, sm_90), which ``bench/instructions.py`` prints
and ``tests/undo_kernels/triton/test_aot.py`` compares. This module can be imported without triton.
"""

from __future__ import annotations

import functools
import math

SMS = 132
CLOCK = 1.98e9  # Hz
BANDWIDTH = 4.3e12  # bytes/s, measured by a copy
CACHE = 5.5e12  # bytes/s from the L2 cache; not measured on this device
MATRIX_16 = 720e12  # FLOP/s of a long 16-bit library product; `_FILL` lowers it for a short sum
MATRIX_32 = 67e12  # FLOP/s, the data sheet's, float32 without tensor cores
TILES_16 = 600e12  # FLOP/s of the products' loop inside a tile kernel, without what comes before and after it
TILES_32 = MATRIX_32
FILL_SECONDS = 1.5e-6  # until the first operands of a tile's products have arrived
_FILL = 110.0  # length of the sum at which a library product reaches half of MATRIX_16
_LIBRARY_TILE = (128, 256)
_SPLITS = (1, 2, 4)  # parts that the library may split a sum into, where there are too few tiles

# (kernel, float32 inputs) to instructions and special-function instructions for each (token, vocabulary entry) pair, of both sides
# together; "known": without the teacher's sums; jsd has a pass "mixture" for the divergence and another for the gradient.
INSTRUCTIONS: dict[tuple[str, bool], tuple[float, float]] = {
    ("stats_rows", False): (24.0, 6.0),
    ("stats_rows", True): (116.0, 6.4),
    ("stats_rows known", False): (12.0, 3.0),
    ("stats_rows known", True): (49.0, 3.1),
    ("loss_rows", False): (45.5, 6.0),
    ("loss_rows", True): (120.0, 6.0),
    ("stats_tiles", False): (25.3, 6.0),
    ("stats_tiles", True): (171.0, 6.1),
    ("stats_tiles known", False): (13.3, 3.0),
    ("stats_tiles known", True): (85.0, 3.1),
    ("loss_tiles", False): (50.3, 6.0),
    ("loss_tiles", True): (126.0, 6.0),
    ("loss_rows mixture", False): (75.0, 7.0),
    ("loss_rows mixture", True): (205.0, 9.1),
    ("loss_rows jsd", False): (60.0, 7.0),
    ("loss_rows jsd", True): (205.0, 9.1),
    ("loss_tiles mixture", False): (73.0, 7.0),
    ("loss_tiles mixture", True): (252.0, 9.1),
    ("loss_tiles jsd", False): (56.2, 7.0),
    ("loss_tiles jsd", True): (216.0, 9.1),
}


def issue_seconds(kernel: str, wide: bool, pairs: float, sms: float = SMS) -> float:
    """Returns the time of a kernel's instructions on so many multiprocessors; ``wide``: float32 inputs."""
    instructions, special = INSTRUCTIONS[kernel, wide]
    return pairs / (sms * CLOCK) * max(instructions / (4 * 32), special / 16)


def product_seconds(rows: float, columns: float, length: float, wide: bool, traffic: float) -> float:
    """Returns the time of a library product ``[rows, length] @ [length, columns]`` that moves so many bytes."""
    if not rows * columns * length:
        return 0.0
    programs = math.ceil(rows / _LIBRARY_TILE[0]) * math.ceil(columns / _LIBRARY_TILE[1])
    filled = max(_filled(split * programs) for split in _SPLITS)
    rate = MATRIX_32 if wide else MATRIX_16 * length / (length + _FILL)
    return max(2.0 * rows * columns * length / (rate * filled), traffic / BANDWIDTH)


def rows_seconds(kernel: str, wide: bool, pairs: float, traffic: float) -> float:
    """Returns the time of a row kernel over stored logits."""
    return max(traffic / BANDWIDTH, issue_seconds(kernel, wide, pairs))


def tiles_seconds(
    kernel: str, wide: bool, tokens: float, vocabulary: float, widths: list[int], tile: tuple[int, int], traffic: float,
    together: bool,
) -> float:  # fmt: skip
    """Returns the time of a tile kernel with one product for each of ``widths``, over tiles ``[tokens, entries]``.

    ``together``: one loop forms both products, so that a program waits once for its first operands.
    """
    block_t, block_v = tile
    programs = math.ceil(tokens / block_t) * math.ceil(vocabulary / block_v)
    waves = math.ceil(programs / SMS)
    itemsize = 4 if wide else 2
    rate = TILES_32 if wide else TILES_16
    one = issue_seconds(kernel, wide, block_t * block_v, 1) + FILL_SECONDS * (1 if together else len(widths))
    for width in widths:
        flops = 2.0 * block_t * block_v * width / (rate / SMS)
        operands = itemsize * width * (block_t + block_v) / (CACHE / SMS)
        one += max(flops, operands)
    return max(waves * one, traffic / BANDWIDTH)


@functools.cache
def fullest_chunk(least: int, most: int, width: int) -> int:
    """Returns the number of tokens, a multiple of 128, whose hidden gradient's product fills its waves of tiles best."""
    across = math.ceil(width / _LIBRARY_TILE[1])

    def filled(tokens: int) -> float:
        return _filled(math.ceil(tokens / _LIBRARY_TILE[0]) * across)

    return max(range(least, most + 1, 128), key=lambda tokens: (round(filled(tokens), 3), tokens))


def _filled(programs: int) -> float:
    """Returns the part of the multiprocessors that waves of so many programs keep busy."""
    return programs / (math.ceil(programs / SMS) * SMS)
