"""Counts the instructions of a compiled kernel for each of the pairs (or elements) that it processes.

The counts are static: of the code that one iteration over a tile or block runs, without the loops of the matrix products.
``cuobjdump``, which Triton brings, disassembles the binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_PRODUCT = re.compile(r"^(?:[HIQ]?GMMA|HMMA|[A-Z]*UTC\w*MMA)")


@dataclass(frozen=True)
class Instruction:
    """One machine instruction.

    Attributes:
        address: its place in the function.
        name: mnemonic with its modifiers.
        target: address that a branch goes to, else None.
        ends: whether the program ends here in any case.
    """

    address: int
    name: str
    target: int | None
    ends: bool


def disassemble(cubin: bytes) -> list[Instruction]:
    """Returns the instructions of a binary with one function, without the padding behind its last branch."""
    found = []
    for address, predicate, name, operands in _LINE.findall(_run("-sass", cubin)):
        to = re.search(r"0x([0-9a-f]+)\s*$", operands) if name.startswith("BRA") else None
        found.append(Instruction(int(address, 16), name, int(to[1], 16) if to else None, name == "EXIT" and not predicate))
    return [i for i in found if i.name != "NOP" and i.target != i.address]


def resources(cubin: bytes) -> dict[str, int]:
    """Returns registers a thread and bytes of local memory, which holds spills and arrays that did not fit registers."""
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", _run("--dump-resource-usage", cubin))}
    return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}


def _run(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOL, option, file.name], capture_output=True, text=True, check=True).stdout


def counts(code: list[Instruction], elements: float) -> dict[str, float]:
    """Returns counts of one iteration, per element that a thread processes; barriers of the whole iteration.

    The iteration is the body of the outermost loop, if it holds most of the special-function instructions, else everything.
    """
    loops = sorted({(i.target, i.address) for i in code if i.target is not None and i.target < i.address})
    loops = [loop for loop in loops if not any(i.ends for i in _of(code, loop))]  # else a jump back from code behind the end
    products = [loop for loop in loops if _multiplies(code, loop)]
    products = [loop for loop in products if not any(_inside(other, loop) for other in products)]
    rest = [loop for loop in loops if not any(_inside(loop, product) or loop == product for product in products)]
    body = max(rest, key=lambda loop: (_special(_of(code, loop)), loop[1] - loop[0]), default=None)
    chosen = code
    if body is not None and 2 * _special(_of(code, body)) > _special(code):
        chosen = _of(code, body)
    epilogue = [i for i in chosen if not any(first <= i.address <= last for first, last in products)]

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, i.name)) for i in epilogue)

    return {
        "instructions": len(epilogue) / elements,
        "special": count("MUFU") / elements,
        "shuffles": count("SHFL") / elements,
        "barriers": count("BAR"),
    }


def _of(code: list[Instruction], loop: tuple[int, int]) -> list[Instruction]:
    return [i for i in code if loop[0] <= i.address <= loop[1]]


def _special(code: list[Instruction]) -> int:
    return sum(i.name.startswith("MUFU") for i in code)


def _multiplies(code: list[Instruction], loop: tuple[int, int]) -> bool:
    return any(_PRODUCT.match(i.name) for i in _of(code, loop))


def _inside(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    """Returns whether ``loop`` lies inside ``other`` and is smaller."""
    return other[0] <= loop[0] and loop[1] <= other[1] and loop != other
