"""Writes the measured tiles in bench/results/tiles/*.json to the table in kernels/undo_kernels/triton/measured_tiles.py.

For each kernel, dtype and width, it takes the fastest candidate that compiles with every option on and spills no registers. If
several GPUs of a target were measured, it takes the candidate with the smallest geometric mean of time over the fastest time.
It needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import harness

TABLE = harness.ROOT / "kernels" / "undo_kernels" / "triton" / "measured_tiles.py"
RESULTS = harness.ROOT / "bench" / "results" / "tiles"

Key = tuple[str, str, bool, int]
Fields = tuple[int, ...]
CHECK = """
import sys, json
from undo_kernels.triton import aot, tile_table
target, kernel, wide, *fields = json.loads(sys.argv[1])
reports = aot.tile_reports(target, kernel, wide, tile_table.Tile(*fields))
print(json.dumps([max(r["spills"] for r in reports), max(r["shared"] for r in reports), aot.SHARED_LIMIT[target]]))
"""


def measured(paths: Iterable[Path]) -> dict[Key, list[dict[Fields, float]]]:
    """Returns the seconds of each valid candidate on each GPU."""
    found: dict[Key, list[dict[Fields, float]]] = {}
    for path in paths:
        parts = json.loads(path.read_text())["parts"]
        for row in [row for part in ("tiles", "tune") for row in parts.get(part, ())]:
            result = row.get("result") or {}
            seconds = {tuple(tried["tile"]): tried["seconds"] for tried in result.get("tried", ()) if "seconds" in tried}
            if seconds:
                key = (result["target"], result["kernel"], result["wide"], result["width"])
                found.setdefault(key, []).append(seconds)
    return found


def ranked(gpus: list[dict[Fields, float]]) -> Iterator[Fields]:
    """Returns the candidates that every GPU timed, fastest first."""
    common = set.intersection(*(set(seconds) for seconds in gpus))
    cost = {tile: sum(math.log(seconds[tile] / min(seconds.values())) for seconds in gpus) for tile in common}
    yield from sorted(common, key=lambda tile: (cost[tile], tile))


def compiles(key: Key, tile: Fields) -> bool:
    """Whether the kernel's heaviest forms compile for the target without a spill; uses a process without the interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", CHECK, json.dumps([*key[:3], *tile])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return False
    spills, shared, limit = json.loads(done.stdout.splitlines()[-1])
    return spills == 0 and shared <= limit


def table(found: dict[Key, list[dict[Fields, float]]], usable: Callable[[Key, Fields], bool] = compiles) -> dict[Key, Fields]:
    """Returns the chosen tile of each key that has one."""
    winners = {key: next((tile for tile in ranked(found[key]) if usable(key, tile)), None) for key in sorted(found)}
    return {key: tile for key, tile in winners.items() if tile is not None}


def source(winners: dict[Key, Fields]) -> str:
    """Returns the text of measured_tiles.py."""
    head = TABLE.read_text().split("MEASURED:")[0]
    declared = "MEASURED: dict[tuple[str, str, bool, int], tuple[int, int, int, int, int, int]] = {"
    lines = [
        f'    ("{target}", "{kernel}", {wide}, {width}): {tile},' for (target, kernel, wide, width), tile in winners.items()
    ]
    return head + declared + ("\n" + "\n".join(lines) + "\n" if lines else "") + "}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if table and results differ")
    options = parser.parse_args(arguments)
    wanted = source(table(measured(sorted(RESULTS.glob("*.json")))))
    same = TABLE.read_text() == wanted
    if options.check:
        if not same:
            print(f"{TABLE.name}: differs from {RESULTS}; python bench/tiles.py rewrites it")
        return int(not same)
    if not same:
        TABLE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
