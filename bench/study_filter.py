"""Measures the share of the gradient that ``filter_below`` takes as zero, on random and on trained hidden states.

    python bench/study_filter.py

A block is skipped if its largest entry is below the bound; its size depends on the backend. Prints, for each bound, the share
of the gradient's entries in skipped blocks. On the CPU the op itself reports the share; the gradient's products skip such a
block (with AMX only the product for the weight). Triton's kernels work on one token (chunk) or a tile of tokens (recompute) at
a time. Their shares are counted here from float64 gradients, with the tile that the table has for an H100, so that no GPU is
needed. These kernels write a skipped block as zeros, which the products then read like any other, so that skipping saves no
time.
"""

from __future__ import annotations

import torch
from activations import generated
from contenders import observed
from harness import path
from problems import Inputs, Row, draw
from undo_kernels.triton import tile_table

from undo_core import ops

BOUNDS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def gradient(inputs: Inputs) -> torch.Tensor:
    """Returns ``p_s - p_t`` of every token in float64, which the bound is compared with."""

    def probabilities(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = hidden.detach().double() @ weight.detach().double().T
        return (z if inputs.softcap is None else inputs.softcap * torch.tanh(z / inputs.softcap)).softmax(-1)

    return probabilities(*inputs.heads[:2]) - probabilities(*inputs.heads[2:])


def skipped(largest: torch.Tensor, tokens: int, entries: int, bound: float) -> float:
    """Returns the share of entries in blocks of ``tokens`` by ``entries`` in which none reaches the bound."""
    pooled = torch.nn.functional.max_pool2d(largest[None], (tokens, entries), ceil_mode=True)[0]
    quiet = torch.nn.functional.interpolate((pooled < bound)[None, None].float(), scale_factor=(tokens, entries))[0, 0]
    return float(quiet[: largest.shape[0], : largest.shape[1]].mean())


def step(inputs: Inputs, bound: float) -> tuple[torch.Tensor, ...]:
    """Runs a forward and a backward pass; returns the skipped share last."""
    capped = {"student_softcap": inputs.softcap, "teacher_softcap": inputs.softcap}
    loss, stats = ops.linear_kl_div(*inputs.heads, **capped, filter_below=bound, return_stats=True)
    return *torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight)), stats.filtered[0]


def main() -> None:
    """Prints the tables."""
    random = draw(Row("random", 512, 16000, 96, "float32", None, ()), "cpu")
    trained = generated().to(torch.float32, "cpu")
    tile = tile_table.tile("sm_90", "filter", True, 2304)
    print("| hidden states | bound | CPU | Triton, chunk | Triton, recompute |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, inputs in (("random", random), ("trained", trained)):
        largest = gradient(inputs).abs()
        row = tile_table.row_block("sm_90", largest.shape[1])
        for bound in BOUNDS:
            (*_, share), ran = observed(lambda inputs=inputs, bound=bound: step(inputs, bound))
            # The recompute plan tests a tile's pieces one by one.
            shares = [
                skipped(largest, 1, row.block_v, bound),
                skipped(largest, tile.block_t, tile.block_v // tile.pieces, bound),
            ]
            print(f"| {name} | {bound:g} | {share:.1%} | " + " | ".join(f"{one:.1%}" for one in shares) + " |", flush=True)
    print(f"\nCPU: {path(ran)}")


if __name__ == "__main__":
    main()
