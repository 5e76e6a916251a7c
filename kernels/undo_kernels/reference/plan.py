"""How plain PyTorch runs a problem: all tokens at once, or in chunks that the backward recomputes."""

from __future__ import annotations

import math

import torch

from undo_kernels.plan import Plan
from undo_kernels.problem import Problem

CHUNKED = "direct, recomputed in chunks"  # the plan's name where the logits exceed the workspace
# Number of [tokens, V] arrays alive at once in forward and backward: measured peak memory over that of one array, rounded up.
COPIES = {"own": 3, "uniform": 5, "forward": 7, "reverse": 9, "jsd": 15, "bucket": 7, "renormalize": 6}


def tokens_within(workspace_bytes: int | None, tokens: int, vocabulary: int, dtype: torch.dtype, copies: int) -> int:
    """Returns the tokens whose ``copies`` arrays of logits fit the workspace; at least one, and all of them without a bound."""
    if workspace_bytes is None:
        return tokens
    itemsize = 8 if dtype == torch.float64 else 4
    return max(1, min(tokens, workspace_bytes // (vocabulary * itemsize * copies)))


def describe(op: str, problem: Problem) -> Plan:
    """Returns the plan of a problem, whose tensors may be on the meta device, as ``explain`` shows it."""
    sides = [problem.student] + ([problem.teacher] if problem.teacher is not None else [])
    tokens, vocabulary, dtype = problem.tokens, problem.student.vocabulary, problem.student.hidden.dtype
    itemsize, copies = 8 if dtype == torch.float64 else 4, COPIES[problem.target]
    chunk = tokens_within(problem.workspace_bytes, tokens, vocabulary, dtype, copies)
    chunks = math.ceil(tokens / chunk) if tokens else 1
    heads = sum(side.weight.numel() * side.weight.element_size() for side in sides)
    products = len(sides) * (2 if chunks > 1 and any(problem.needs) else 1) + sum(problem.needs[:2])
    width = sum(side.weight.shape[1] for side in sides) / len(sides)
    return Plan(
        op=op,
        name="direct" if chunks == 1 else CHUNKED,
        tokens_per_chunk=chunk,
        buffers={"logits and their like": chunk * vocabulary * itemsize * copies},
        traffic_bytes=int(3 * copies * tokens * vocabulary * itemsize + 2 * chunks * heads),
        flops=products * 2.0 * tokens * vocabulary * width,
        seconds=None,
    )
