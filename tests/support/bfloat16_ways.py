"""The ways in which this machine can multiply heads in bfloat16: each product of the C++ kernels, and conversion to float32."""

from undo_kernels import cpu

CONVERTED = "converted"
WAYS = (*cpu.bfloat16_products(), CONVERTED)


def use_way(way, monkeypatch):
    """Sets the way for the rest of the test."""
    if way != CONVERTED:
        monkeypatch.setenv("UNDO_CPU_ISA", way)
    elif cpu.instruction_sets():
        monkeypatch.setenv("UNDO_CPU_ISA", cpu.instruction_set.vectors())
