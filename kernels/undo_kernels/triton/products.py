"""Library matrix products in the dtypes that the plans need, and the count of scratch memory."""

from __future__ import annotations

import torch

TILE_ROWS = 4096  # output rows computed in a separate buffer before they are added or rounded


class Workspace:
    """Allocates scratch tensors and records the peak of the bytes held at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = self.peak = 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns an uninitialised tensor, counted until it is given back."""
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self.count(tensor)
        return tensor

    def count(self, tensor: torch.Tensor) -> torch.Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        self.peak = max(self.peak, self.bytes)
        return tensor

    def give(self, *tensors: torch.Tensor | None) -> None:
        """Stops counting tensors that are no longer held."""
        self.bytes -= sum(t.numel() * t.element_size() for t in tensors if t is not None)


def product_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Returns the dtype of a head's product: that of its operands, or float32 if they differ."""
    return hidden.dtype if hidden.dtype == weight.dtype else torch.float32


def multiply(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, add: bool, scratch: Workspace) -> None:
    """Computes ``out (+)= a @ b``; sums in float32.

    ``a`` and ``b`` have the same dtype; ``out`` has that dtype or float32, or is 16-bit with float32 operands.

    float32 products follow torch.backends.cuda.matmul.allow_tf32, which is off unless the caller opted in.
    """
    if out.numel() == 0 or a.shape[1] == 0:
        if not add:
            out.zero_()
        return
    wide = torch.float32
    if (
        a.device.type != "cuda"
    ):  # the interpreter's tensors, or without memory: only CUDA has products with another output dtype
        if a.dtype != b.dtype or (a.dtype != wide and out.dtype not in (a.dtype, wide)):
            raise TypeError(
                f"dtype: got {a.dtype} and {b.dtype} into {out.dtype}, wanted equal operands and their dtype or float32"
            )
        a, b = a.float(), b.float()
        out.copy_(out.float() + a @ b if add else a @ b)
        return
    if out.dtype == a.dtype:
        out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        return
    if out.dtype == wide:
        torch.addmm(out, a, b, out_dtype=wide, out=out) if add else torch.mm(a, b, out_dtype=wide, out=out)
        return
    part = scratch.take(min(TILE_ROWS, out.shape[0]), out.shape[1])
    for first in range(0, out.shape[0], TILE_ROWS):
        rows = out[first : first + TILE_ROWS]
        tile = part[: rows.shape[0]]
        torch.mm(a[first : first + TILE_ROWS], b, out=tile)
        rows.add_(tile) if add else rows.copy_(tile)
    scratch.give(part)


def multiply_widened(
    out: torch.Tensor, dz: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor, add: bool, scratch: Workspace
) -> None:
    """Computes ``out (+)= dz @ weight`` in float32, widening one tile of the weight at a time."""
    for first in range(0, weight.shape[0], TILE_ROWS):
        tile = widened(weight, dz.dtype, first, TILE_ROWS, buffer)
        multiply(out, dz[:, first : first + TILE_ROWS], tile, add or first > 0, scratch)


def separate_bytes(out: torch.dtype, operand: torch.dtype, rows: int, columns: int) -> int:
    """Returns the bytes of the separate buffer that :func:`multiply` uses on a GPU."""
    if out in (operand, torch.float32):
        return 0
    return 4 * min(TILE_ROWS, rows) * columns


def widened(weight: torch.Tensor, dtype: torch.dtype, first: int, rows: int, buffer: torch.Tensor | None) -> torch.Tensor:
    """Returns rows of a weight in the product's dtype, converted into ``buffer`` if it differs."""
    tile = weight[first : first + rows]
    return tile if weight.dtype == dtype else buffer[: tile.shape[0]].copy_(tile)


def logits(
    out: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor | None, scratch: Workspace
) -> None:
    """Computes ``out[rows, V] = hidden @ weight.T`` in float32."""
    if weight.dtype == hidden.dtype:
        multiply(out, hidden, weight[: out.shape[1]].T, False, scratch)
        return
    for first in range(0, out.shape[1], TILE_ROWS):
        rows = min(TILE_ROWS, out.shape[1] - first)
        multiply(out[:, first : first + rows], hidden, widened(weight, hidden.dtype, first, rows, buffer).T, False, scratch)
