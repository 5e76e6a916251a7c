"""Runs each C++ kernel once with AVX2, for callgrind to count; loads the extension by its path, with numpy and without torch.

Without torch, a run under valgrind takes seconds. Sizes are small and fixed; the count per element does not depend on them.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass

import numpy as np

SET = "avx2"
TOKENS, VOCABULARY, ELEMENTS, WIDTH = 64, 1024, 1 << 16, 2304


@dataclass(frozen=True)
class Kernel:
    """A kernel: a pattern for the names of its functions, and the number of elements that it runs on."""

    function: str
    elements: int


KERNELS = {
    "statistics of two heads": Kernel(r"stats", TOKENS * VOCABULARY),
    "loss and gradient, forward KL": Kernel(r"loss", TOKENS * VOCABULARY),
    "noise, uniform, float32": Kernel(r"part_of", ELEMENTS),
    "RMU loss and gradient": Kernel(r"rmu", 32 * WIDTH),
}


def run(library: object) -> None:
    rng = np.random.default_rng(0)
    # -- two heads' statistics, then the loss and its gradient
    leading = 16 * (TOKENS // 16 | 1)
    z_s, z_t = (rng.standard_normal((VOCABULARY, leading), dtype=np.float32) for _ in range(2))
    fields = library.FIELDS
    state = np.zeros((fields, TOKENS))
    m_s, l_s, m_t, l_t = (int(getattr(library.Field, name)) for name in ("M_S", "L_S", "M_T", "L_T"))
    state[[m_s, m_t]] = -np.inf
    partial = np.zeros((-(-VOCABULARY // library.BLOCK), fields, TOKENS))
    names = ("base_s", "base_t", "log_sum_s", "log_sum_t", "gap", "offset", "weight", "own", "label_weight")
    rows = dict(zip(names, np.zeros((len(names), TOKENS), dtype=np.float32), strict=True))
    chunk = library.Chunk()
    chunk.tokens = chunk.stride = TOKENS
    chunk.leading, chunk.target = leading, int(library.Target.forward)
    chunk.uniform, chunk.statistics, chunk.own_term = False, False, False
    chunk.state, chunk.partial = state.ctypes.data, partial.ctypes.data
    for name, row in rows.items():
        setattr(chunk, name, row.ctypes.data)
    library.stats(SET, chunk, z_s.ctypes.data, z_t.ctypes.data, 0, VOCABULARY)
    rows["base_s"][:], rows["base_t"][:] = state[m_s], state[m_t]
    rows["log_sum_s"][:], rows["log_sum_t"][:] = np.log(state[l_s]), np.log(state[l_t])
    rows["gap"][:], rows["weight"][:] = rows["log_sum_s"] - rows["log_sum_t"], 1.0 / TOKENS
    library.loss(SET, chunk, z_s.ctypes.data, z_t.ctypes.data, 0, VOCABULARY, True)
    # -- noise
    values = np.full(ELEMENTS, 0.02, dtype=np.float32)
    segment = library.Segment(
        values.ctypes.data, ELEMENTS, library.Type.float32, library.Law.uniform, 1, 0.5, 1e-9, 0, ELEMENTS, 1
    )
    library.noise(SET, [segment], 1, False)
    # -- RMU
    hidden, target = rng.standard_normal((32, WIDTH), dtype=np.float32), rng.standard_normal(WIDTH, dtype=np.float32)
    gradient, sums = np.empty_like(hidden), np.empty(32)
    kind = int(library.Kind.float32)
    library.rmu_loss(
        SET,
        32,
        WIDTH,
        hidden.ctypes.data,
        kind,
        WIDTH,
        target.ctypes.data,
        kind,
        0,
        6.5,
        0,
        gradient.ctypes.data,
        sums.ctypes.data,
    )


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("_cpu", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run(module)
