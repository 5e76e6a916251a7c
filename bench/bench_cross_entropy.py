"""Compares linear_cross_entropy with what a user would take instead; runner.py describes the measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import measuring
import runner
from measuring import Suite
from peers_cross_entropy import CONTENDERS
from problems import ALL, Row, cross_entropy_oracle

NAMES = ("undo-core", "undo-reference", "plain", "compile", "auto-chunker", "torch-chunked", "liger", "trl", "cce", "products")
MOST = ("undo-core", "plain", "compile", "torch-chunked", "trl", "products")
CAPPED = ("undo-core", "plain", "liger", "trl", "cce", "products")

ROWS = {
    "cpu": [
        Row("f32-32k", 1024, 32000, 320, "float32", None, NAMES),
        Row("bf16-256k", 256, 256000, 320, "bfloat16", None, NAMES, ALL, "0.1B"),
        Row("f32-256k", 512, 256000, 320, "float32", None, ("undo-core", "undo-core-workspace", *NAMES[1:]), ALL, "0.1B"),
        Row("f32-32k-softcap", 1024, 32000, 320, "float32", 30.0, CAPPED, ALL),
        Row("f32-0.3b", 256, 256000, 768, "float32", None, MOST, ALL, "0.3B"),
        Row("bf16-2b", 64, 256000, 2304, "bfloat16", None, MOST, ALL, "Gemma 2 2B"),
        Row("bf16-8b", 64, 128256, 4096, "bfloat16", None, MOST, ALL, "Llama 3 8B"),
    ],
    "cuda": [
        Row("bf16-256k-d2304", 8192, 256000, 2304, "bfloat16", 30.0, NAMES, model="Gemma 2 2B"),
        Row("bf16-256k-d320", 8192, 256000, 320, "bfloat16", 30.0, NAMES, model="0.1B"),
        Row("bf16-128k-d4096", 8192, 128256, 4096, "bfloat16", None, NAMES, model="Llama 3 8B"),
        Row("bf16-32k-d4096", 8192, 32000, 4096, "bfloat16", None, NAMES, ALL),
    ],
}
QUICK = {  # the smallest size at which the kernels run: dispatch leaves smaller problems to plain PyTorch
    device: [
        Row(f"quick-{short}", 64, 8209, 32, dtype, None, NAMES) for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))
    ]
    for device in ("cpu", "cuda")
}
SUITE = Suite(
    name="cross-entropy",
    script="bench/bench_cross_entropy.py",
    contenders=CONTENDERS,
    oracle=cross_entropy_oracle,
    teacher=False,
    rows=ROWS,
    quick=QUICK,
    sections={},
    shows={},
)


# -- for pytest bench --benchmark-only -----------------------------------------------------------------------------------------


def pytest_generate_tests(metafunc: Any) -> None:
    measuring.parametrize(metafunc, SUITE)


def test_step(benchmark: Any, case: measuring.Case) -> None:
    measuring.run_case(benchmark, SUITE, case)


def main(arguments: Sequence[str] | None = None) -> None:
    runner.main(SUITE, __doc__ or "", arguments)


if __name__ == "__main__":
    main()
