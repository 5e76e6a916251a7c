"""Embedding erasure: the rows of tokens that are characteristic of the forget text lose what they hold.

``E_v <- fill_v`` for every erased token v, in the embedding and in the head:

- ``mean``: ``fill_v`` is the mean of the rows that stay;
- ``redraw``: ``fill_v = s * N``, with N standard normal and ``s`` the root mean square of the entries that stay. N depends only on
  the seed, the matrix's name and the index (Philox-4x32-10).

:mod:`undo_core.data.characteristic` ranks the tokens. That knowledge survives in the embeddings, and that erasing it there makes
relearning harder, is the observation of EMBER (Suslik, Shafran and Geva 2026, "Don't Forget Your Embeddings", arXiv 2606.03695),
which removes single features of the rows by sparse matrix factorisation. This operator is coarser and removes whole rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel
from undo_kernels.library.backends import implementation
from undo_kernels.noise_segments import Segment
from undo_kernels.ops import checks
from undo_kernels.ops.noise_rules import canonical_name

FILLS = ("mean", "redraw")


@dataclass(frozen=True)
class EraseConfig:
    """Erases the rows of the most characteristic tokens of the forget text, in the embedding and the head.

    Attributes:
        tokens: number of tokens; 0 erases none.
        fill: mean, or redraw.
    """

    tokens: int = 0
    fill: Literal["mean", "redraw"] = "mean"

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"erase.tokens: got {self.tokens}, wanted an integer >= 0")
        checks.choice("erase.fill", self.fill, FILLS)


@torch.no_grad()
def erase_(model: PreTrainedModel, tokens: torch.Tensor, *, fill: str = "mean", seed: int = 0) -> None:
    """Erases tokens in the embedding and in the head of ``model``, in place; a matrix that both share is changed once.

    Args:
        model: its matrices must be whole and in memory.
        tokens: ``[n]`` different token ids, some but not all of the vocabulary.
        fill: mean or redraw.
        seed: in [0, 2**64), for redraw.

    Raises:
        ValueError: an argument is invalid; nothing is changed.
    """
    checks.choice("fill", fill, FILLS)
    checks.seed(seed)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = {id(module.weight) for module in (embedding, head) if module is not None}
    matrices = {canonical_name(name): p for name, p in model.named_parameters() if id(p) in wanted}
    rows = min(len(matrix) for matrix in matrices.values())
    if tokens.ndim != 1 or len(tokens.unique()) < len(tokens) or not 0 < len(tokens) < rows:
        checks.fail("tokens", f"{tuple(tokens.shape)} ids", f"from 1 to {rows - 1} different ones")
    if int(tokens.min()) < 0 or int(tokens.max()) >= rows:
        checks.fail("tokens", f"ids from {int(tokens.min())} to {int(tokens.max())}", f"ids from 0 to {rows - 1}")
    for name, matrix in matrices.items():
        erased = tokens.to(matrix.device)
        stays = torch.ones(len(matrix), dtype=torch.bool, device=matrix.device)
        stays[erased] = False
        kept = matrix[stays].double()
        if fill == "mean":
            matrix[erased] = kept.mean(0).to(matrix.dtype)
        else:
            drawn = torch.zeros(len(erased), matrix.shape[1], device=matrix.device)
            scale = math.sqrt(float(kept.square().mean()))
            implementation("noise_", drawn.device)([Segment(drawn, name, "normal", 0.0, scale)], seed, False)
            matrix[erased] = drawn.to(matrix.dtype)
