"""How an op runs on given shapes, as ``undo_kernels.ops.explain`` describes it; each backend makes its own plans."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How an op would run. ``print`` shows it as a table.

    Attributes:
        op: name of the op.
        name: name of the plan. ``direct`` is plain PyTorch, ``chunk`` keeps the logits of a chunk between two passes,
            ``recompute`` and ``one pass`` keep none.
        tokens_per_chunk: number of tokens whose logits are held at once.
        buffers: bytes of each buffer, by name; everything beyond inputs, outputs and a few floats per token.
        traffic_bytes: bytes read and written, forward and backward.
        flops: FLOPs of the matrix products, forward and backward.
        seconds: predicted time; None where no rates are known for the device.
        products: how the heads' matrix products are computed, and why; empty where the backend has one way.
    """

    op: str
    name: str
    tokens_per_chunk: int
    buffers: dict[str, int]
    traffic_bytes: int
    flops: float
    seconds: float | None
    products: str = ""

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(self.buffers.values())

    def __str__(self) -> str:
        time = "unknown for this device" if self.seconds is None else f"{self.seconds * 1e3:.2f} ms"
        mib = lambda size: f"{size / 2**20:,.1f} MiB"  # noqa: E731
        lines = [
            ("op", self.op),
            ("plan", self.name),
            ("tokens per chunk", f"{self.tokens_per_chunk:,}"),
            ("workspace", mib(self.workspace_bytes)),
            *((f"  {name}", mib(size)) for name, size in self.buffers.items()),
            ("memory traffic", mib(self.traffic_bytes)),
            ("matrix products", f"{self.flops / 1e9:,.2f} GFLOP" + (f", {self.products}" if self.products else "")),
            ("time", time),
        ]
        return "\n".join(f"{name:<24} {value}" for name, value in lines)
