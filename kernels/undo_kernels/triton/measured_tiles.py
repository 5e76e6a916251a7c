"""Tiles that were fastest on a GPU: (target, kernel, float32 operands, width) to the fields of a Tile.

Written by ``python bench/tiles.py`` from bench/results/tiles/*.json, which ``bench/gpu_suite.sh --part tune`` measures.
"""

MEASURED: dict[tuple[str, str, bool, int], tuple[int, int, int, int, int, int]] = {}
