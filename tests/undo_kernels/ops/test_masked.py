"""What a token that does not count holds has no influence: not one bit of a loss, a gradient or a statistic, on any backend.

A token that is masked may still count for its label; then what the teacher holds there has no influence.
"""

import math

import pytest
import torch
import undo_kernels
from random_draws import Draw, bits
from undo_kernels.ops import checks
from undo_kernels.triton import vocab_loss as triton_loss

from undo_core import ops

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy, which warns of NaN and infinities
TOKENS, VOCABULARY, WIDTH, KNOWN = 5, 70, 8, 3
DEVICE = torch.device("cpu" if triton_loss.INTERPRETED else "cuda")
HARD = torch.tensor([math.nan, math.inf, -math.inf])
DENSE = ("forward", "reverse", "jsd")
OPS = {
    **{f"linear_kl_div {name}": (ops.linear_kl_div, {"divergence": name}) for name in DENSE},
    **{f"kl_div {name}": (ops.kl_div, {"divergence": name}) for name in DENSE},
    **{f"linear_sparse_kl_div {name}": (ops.linear_sparse_kl_div, {"tail": name}) for name in ("bucket", "renormalize")},
    **{f"sparse_kl_div {name}": (ops.sparse_kl_div, {"tail": name}) for name in ("bucket", "renormalize")},
    "linear_cross_entropy": (ops.linear_cross_entropy, {}),
    "linear_uniform_kl": (ops.linear_uniform_kl, {}),
    "rmu_loss masked": (ops.rmu_loss, {"normalize": "masked"}),
    "rmu_loss sequence": (ops.rmu_loss, {"normalize": "sequence"}),
}


def drawn(name, d, everything):
    """Returns an op with random arguments: its student's tensors, its others, its options, and the names of those with a row for each
    token, with the tokens at which these rows have no influence. ``everything``: with a mask, and all that goes with it."""
    op, options = OPS[name]
    options, dtype = dict(options), d.choose("dtype", (torch.float32, torch.bfloat16))
    mask = torch.tensor([True, False, True, False, False])
    student, others, silent = {"hidden": d.normal(TOKENS, WIDTH)}, {}, {"hidden": ~mask}
    if op is ops.rmu_loss:
        others["target"], options["mask"], silent["target"] = d.normal(TOKENS, WIDTH), mask, ~mask
        return op, {k: v.to(dtype) for k, v in student.items()}, others, options, silent
    given = not name.startswith("linear")
    if given:
        student["hidden"] = d.normal(TOKENS, VOCABULARY)
    else:
        student["weight"] = d.normal(VOCABULARY, WIDTH)
    options |= {"reduction": d.choose("reduction", ("mean", "sum", "none"))}
    options["plan"] = "chunk" if given or "sparse" in name else d.choose("plan", ("chunk", "recompute"))
    if not everything and d.often(0.6, "masked by weight"):
        options["token_weight"] = d.shares(TOKENS) + 0.1
        options["token_weight"][~mask] = 0.0
    else:
        options["mask"] = mask
    if op in (ops.kl_div, ops.linear_kl_div):
        others = {key: d.normal(*value.shape) for key, value in student.items()}
        silent["others' hidden"] = ~mask
        options["return_stats"] = everything or d.often(0.5, "statistics")
        if everything or d.often(0.5, "known log-sum-exp"):
            z = others["hidden"] if given else others["hidden"].to(dtype).float() @ others["weight"].to(dtype).float().T
            options["teacher_lse"], silent["teacher_lse"] = z.to(dtype if given else z.dtype).float().logsumexp(-1), ~mask
        if everything or ("mask" in options and d.often(0.5, "labels")):
            options |= {"labels": torch.tensor([3, 4, -100, -100, 69]), "label_weight": 0.5}
            silent["hidden"] = torch.arange(TOKENS) == 3  # the only one without a label, too
    elif "sparse" in name:
        others["indices"] = torch.stack([torch.randperm(VOCABULARY, generator=d.generator)[:KNOWN] for _ in range(TOKENS)])
        others["logprobs"] = (d.shares(TOKENS, KNOWN) / KNOWN + 1e-3).log()
        silent |= {"others' indices": ~mask, "others' logprobs": ~mask}
    elif op is ops.linear_cross_entropy:
        others["labels"] = torch.tensor([3, 4, -100, -100, 69])
        silent["hidden"] = (others["labels"] == -100) | ~mask
    return op, {k: v.to(dtype) for k, v in student.items()}, others, options, silent


def run(backend, op, student, others, options, silent, held):
    """Returns the bits of loss, gradients and statistics, where the rows without influence hold these values."""

    def filled(key, tensor):
        if key in silent:
            tensor = tensor.clone()
            values = held(int(silent[key].sum()))
            values = values if tensor.is_floating_point() else values.nan_to_num(7e8, 9e8, -9e8)  # no vocabulary has so many
            tensor[silent[key]] = values.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
        tensor = tensor.double() if backend == "float64" and tensor.is_floating_point() else tensor
        return tensor.to(DEVICE if backend == "triton" else "cpu")

    leaves = {key: filled(key, tensor).requires_grad_() for key, tensor in student.items()}
    rest = [filled("target" if key == "target" else f"others' {key}", tensor) for key, tensor in others.items()]
    options = {key: filled(key, value) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    with undo_kernels.backend("reference" if backend == "float64" else backend), undo_kernels.recorded() as calls:
        result = op(*leaves.values(), *rest, **options)
        loss, statistics = result if isinstance(result, tuple) else (result, ())
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
    assert {call.backend for call in calls} == {"reference" if backend == "float64" else backend}
    assert all(tensor.isfinite().all() for tensor in (loss, *gradients)), "what counts is finite"
    for tensor in statistics:  # of a masked token they are 0
        uncounted = silent["others' hidden"].to(tensor.device)
        assert tensor.isfinite().all() and not tensor[uncounted].any()
    assert not gradients[0][silent["hidden"].to(gradients[0].device)].any()
    return [bits(tensor.cpu()) for tensor in (loss, *gradients, *statistics)]


@pytest.mark.parametrize("sight", ["looks", "blind"])
@pytest.mark.parametrize("backend", ["float64", "reference", "cpu", "triton"])
@pytest.mark.parametrize("name", OPS)
def test_a_token_that_does_not_count_has_no_influence(name, backend, sight, monkeypatch):
    if sight == "blind":  # as where the values are on a GPU, or the call is compiled
        monkeypatch.setattr(checks, "looks", lambda tensor: False)
    for seed in range(1 if backend == "triton" else 3):
        d = Draw(seed + sum(map(ord, name + sight)))
        case = drawn(name, d, everything=seed == 0)
        results = [run(backend, *case, held) for held in (lambda n: HARD.repeat(n)[:n], lambda n: torch.full((n,), -0.25))]
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want), str(d)
