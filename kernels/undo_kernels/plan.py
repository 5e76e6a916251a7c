"""Plans: how an op runs on given shapes, with its predicted bytes, FLOPs and workspace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# [rows, V] arrays that the direct plan holds at once, forward and backward, and matrix products over [rows, V, d] in both passes.
_COPIES = {"linear_kl_div": 4, "linear_lse": 2, "linear_cross_entropy": 2, "linear_uniform_kl": 3, "linear_sparse_kl_div": 4}
_PRODUCTS = {"linear_kl_div": 4, "linear_lse": 1, "linear_cross_entropy": 3, "linear_uniform_kl": 3, "linear_sparse_kl_div": 3}


@dataclass(frozen=True)
class Plan:
    """How an op would run. ``print`` shows it as a table.

    Attributes:
        op: name of the op.
        name: of the plan; ``direct`` holds ``[rows, V]`` logits, in chunks of rows where a workspace bounds them.
        rows_per_chunk: rows whose logits are held at once.
        workspace_bytes: logits and what is made of them.
        traffic_bytes: read and written, forward and backward.
        flops: of the matrix products, forward and backward.
        seconds: predicted time; None where no rates are known for the device.
    """

    op: str
    name: str
    rows_per_chunk: int
    workspace_bytes: int
    traffic_bytes: int
    flops: float
    seconds: float | None

    def __str__(self) -> str:
        time = "unknown for this device" if self.seconds is None else f"{self.seconds * 1e3:.2f} ms"
        lines = [
            ("op", self.op),
            ("plan", self.name),
            ("rows per chunk", f"{self.rows_per_chunk:,}"),
            ("workspace", f"{self.workspace_bytes / 2**20:,.1f} MiB"),
            ("memory traffic", f"{self.traffic_bytes / 2**20:,.1f} MiB"),
            ("matrix products", f"{self.flops / 1e9:,.2f} GFLOP"),
            ("time", time),
        ]
        return "\n".join(f"{name:<16} {value}" for name, value in lines)


def rows_within(workspace_bytes: int | None, rows: int, vocabulary: int, dtype: torch.dtype, copies: int) -> int:
    """Rows whose ``copies`` arrays of logits fit the workspace; at least one, all of them without a bound."""
    if workspace_bytes is None:
        return rows
    itemsize = 8 if dtype == torch.float64 else 4
    return max(1, min(rows, workspace_bytes // (vocabulary * itemsize * copies)))


def make_plan(
    op: str, rows: int, vocabulary: int, widths: tuple[int, ...], dtype: torch.dtype, workspace_bytes: int | None
) -> Plan:
    """The plan for an op over ``rows`` tokens; ``widths`` are the hidden sizes (student, then teacher)."""
    copies = _COPIES[op]
    chunk = rows_within(workspace_bytes, rows, vocabulary, dtype, copies)
    itemsize = 8 if dtype == torch.float64 else 4
    products = _PRODUCTS[op]
    width = sum(widths) / len(widths)
    chunks = math.ceil(rows / chunk) if rows else 1
    heads = sum(widths) * vocabulary * torch.empty(0, dtype=dtype).element_size()
    recomputed = products + (len(widths) if chunks > 1 else 0)
    return Plan(
        op=op,
        name="direct" if chunks == 1 else "direct, recomputed in chunks",
        rows_per_chunk=chunk,
        workspace_bytes=chunk * vocabulary * itemsize * copies,
        traffic_bytes=int(3 * copies * rows * vocabulary * itemsize + 2 * chunks * heads),
        flops=2.0 * recomputed * rows * vocabulary * width,
        seconds=None,
    )
