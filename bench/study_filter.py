"""What share of the gradient ``filter_below`` takes as zero, on random and on trained hidden states.

    python bench/study_filter.py

A block is skipped where its largest entry is below the bound; how large a block is depends on the backend. Prints for each
bound the share of the gradient's entries in skipped blocks. On the CPU the op itself reports it: a skipped block costs none of
the gradient's products (with AMX, not the weight's). Triton's kernels work on one token (chunk) or a tile of tokens (recompute)
at a time: their shares are counted here from float64 gradients, with the tile that the table has for an H100, so that no GPU is
needed. They write a skipped block as zeros, which the products then take like any other: it saves nothing.
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
    """``p_s - p_t`` of every token in float64, what the bound is compared with."""

    def probabilities(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        z = hidden.detach().double() @ weight.detach().double().T
        return (z if inputs.softcap is None else inputs.softcap * torch.tanh(z / inputs.softcap)).softmax(-1)

    return probabilities(*inputs.heads[:2]) - probabilities(*inputs.heads[2:])


def skipped(largest: torch.Tensor, tokens: int, rows: int, bound: float) -> float:
    """The share of entries in blocks of so many tokens and vocabulary entries of which none reaches the bound."""
    pooled = torch.nn.functional.max_pool2d(largest[None], (tokens, rows), ceil_mode=True)[0]
    quiet = torch.nn.functional.interpolate((pooled < bound)[None, None].float(), scale_factor=(tokens, rows))[0, 0]
    return float(quiet[: largest.shape[0], : largest.shape[1]].mean())


def step(inputs: Inputs, bound: float) -> tuple[torch.Tensor, ...]:
    """A forward and backward pass; the share that was skipped comes last."""
    capped = {"student_softcap": inputs.softcap, "teacher_softcap": inputs.softcap}
    loss, stats = ops.linear_kl_div(*inputs.heads, **capped, filter_below=bound, return_stats=True)
    return *torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight)), stats.filtered[0]


def main() -> None:
    """Print the tables."""
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
