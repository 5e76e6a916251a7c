"""Random calls of every op in C++ against the reference in float64, and a few whose sizes multiply to more than 32 bits."""

from collections import Counter

import pytest
import random_calls
import torch
import undo_kernels
from rounding import assert_as_exact_as, gamma
from undo_kernels import cpu, ops

pytestmark = pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed")
FAR = 2**31 + 7


def test_random_calls(tries, account):
    count = tries(150, 100_000)
    kinds = Counter(random_calls.check(seed) for seed in range(count))
    assert set(kinds) == set(random_calls.KINDS)
    for kind, number in kinds.items():
        account(f"random calls: {kind}", tried=number, survived=number)


def test_sizes_whose_product_passes_32_bits(tries, account):
    """One row that stands for all of them (a stride of 0) makes them cheap in memory; one token is the oracle of all."""
    tries(0, 1)
    one = torch.randn(3, 4096, generator=torch.Generator().manual_seed(0))
    with undo_kernels.backend("cpu"):
        tokens = FAR // 4096 + 1
        loss = ops.rmu_loss(one[0].expand(tokens, 4096), one[1], coefficient=0.5)
        few = ops.rmu_loss(one[:1].double(), one[1].double(), coefficient=0.5)
        assert_as_exact_as(loss, few, few, gamma(2048), "rmu")
        weight = (one[1] / 64).expand(FAR // 4096 + 1, 4096)
        got = ops.linear_lse(one[:1], weight, plan="recompute")
        want = one[:1].double() @ one[1].double() / 64 + torch.tensor(float(len(weight)), dtype=torch.float64).log()
        assert_as_exact_as(got, want, want, gamma(4096), "lse", scale=64.0)
        rows = torch.randn(1, 16, generator=torch.Generator().manual_seed(1)).expand(FAR // 65_536 + 1, 16)
        head = torch.randn(65_536, 16, generator=torch.Generator().manual_seed(2))
        got = ops.linear_lse(rows, head, plan="recompute")
        want = (rows[:1].double() @ head.double().T).logsumexp(-1).expand(len(rows))
        assert_as_exact_as(got, want, want, gamma(256), "lse of many tokens", scale=float(want.norm()))
    account("products of sizes past 2**31", tried=3, survived=3)
