"""``undo doctor``: versions, devices and backends, and whether each op works on this machine.

An op passes if its loss and gradients agree with float64 and the recorded calls show that the requested backend ran. Without
the second condition, plain PyTorch could pass unnoticed in place of a kernel that is missing or that skips small problems.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import undo_kernels
from rich.console import Console
from rich.table import Table
from undo_kernels.projection import Projection

from undo_core import ops
from undo_core.pipeline.store import load_warning, machine, usable_cores
from undo_core.version import __version__

Check = Callable[
    [str, torch.dtype, str], tuple[Callable[[], torch.Tensor], torch.Tensor]
]  # device, dtype, plan: call and result
_SLOW = 1.5  # torch's bfloat16 product against its float32 one: 0.3 to 0.4 with AMX or AVX512-BF16, 3 to 5 without
_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


def run_doctor() -> int:
    """Prints the findings, with a line for each problem; returns 0 if the pipeline can run on this machine, else 1."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    problems: list[str] = []
    console.print(_facts())
    table = Table(box=None, pad_edge=False)
    table.add_column("op")
    for name in undo_kernels.library.backends.BACKENDS:
        table.add_column(name)
    for op, check in _CHECKS.items():
        cells = []
        for name in undo_kernels.library.backends.BACKENDS:
            verdict = _verdict(op, name, check)
            if not verdict.startswith("ok") and verdict not in ("-", "not here"):
                problems.append(f"{op} fails on the {name} backend: {verdict}")
            cells.append(verdict)
        table.add_row(op, *cells)
    console.print(table)
    for name, reason in undo_kernels.unavailable().items():
        console.print(f"{name}: {reason}")
    if (slower := _bfloat16_against_float32()) > _SLOW:
        console.print(
            f"WARNING torch's bfloat16 products take {slower:.1f} times as long as its float32 ones on this processor: train in float32 here."
        )
    if busy := load_warning():
        console.print(busy)
    for problem in problems:
        console.print(f"PROBLEM {problem}")
    console.print("Everything that the pipeline needs works here." if not problems else "The pipeline cannot run here.")
    return 1 if problems else 0


def _facts() -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("undo-core", __version__)
    table.add_row("python", platform.python_version())
    for name in _PACKAGES:
        table.add_row(name, _version(name))
    facts = machine()
    table.add_row("processor", f"{facts['device']}, {usable_cores()} cores, torch uses {facts['threads']} threads")
    table.add_row("vector units", torch.backends.cpu.get_cpu_capability())
    if "cpu" not in undo_kernels.unavailable():
        hidden, weight = torch.empty(64, 32, dtype=torch.bfloat16), torch.empty(64, 32, dtype=torch.bfloat16)
        table.add_row("heads in bfloat16", undo_kernels.cpu.plan.products_of(Projection(hidden, weight), narrow=False))
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    table.add_row(
        "GPUs", ", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor})" for g in gpus) or "none"
    )
    memory = (
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB" if hasattr(os, "sysconf") else "unknown"
    )
    table.add_row("memory", f"{memory}; {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free on this disk")
    table.add_row("C++ compiler", shutil.which(os.environ.get("CXX", "c++")) or "none")
    table.add_row(
        "backend asked for", undo_kernels.requested_backend() or "none: C++ on CPUs, Triton on GPUs, else the reference"
    )
    return table


def _bfloat16_against_float32() -> float:
    """Returns the time of torch's matrix product in bfloat16 as a multiple of the float32 one's, each the best of three, on the CPU."""
    best = []
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.ones(256, 512, dtype=dtype, device="cpu"), torch.ones(512, 1024, dtype=dtype, device="cpu")
        times = []
        for _ in range(4):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        best.append(min(times[1:]))
    return best[0] / best[1]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdict(op: str, name: str, check: Check) -> str:
    """Result of an op on a backend: "ok" and the kernels that ran, "-" or "not here", or what is wrong."""
    fused = op in _FUSED
    if name not in undo_kernels.backends_of("vocab_loss" if fused else op) and not (fused and name == "reference"):
        return "-"
    if name in undo_kernels.unavailable():
        return "not here"
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    ran = []
    for dtype, limit in _LIMITS.items() if fused else [(torch.float32, _LIMITS[torch.float32])]:
        try:
            # "chunk" forces the kernels; with so small a vocabulary the direct plan would be chosen.
            run, wanted = check(device, dtype, "direct" if name == "reference" else "chunk")
            with undo_kernels.backend(name), undo_kernels.recorded() as calls:
                got = run()
            error = float((got.double() - wanted).norm() / wanted.norm())
        except Exception as error:  # any exception is reported as the op's result
            return f"{type(error).__name__}: {error}"
        backends = {call.backend for call in calls}
        if backends != {name}:
            return f"wrong: ran on {', '.join(sorted(backends)) or 'nothing'}"
        if not error < limit:
            return f"wrong: relative error {error:.1g} in {str(dtype).removeprefix('torch.')}"
        ran += [call.form for call in calls if call.form]
    return f"ok ({', '.join(dict.fromkeys(ran))})" if ran else "ok"


def _draw(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draws the student's hidden states, the head's weight and the teacher's hidden states; the width of 32 suits AMX tiles."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 32), (11, 32), (5, 32))
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(place < 2)
        for place, shape in enumerate(shapes)
    ]


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, str], torch.Tensor]  # hidden, weight, teacher's hidden, plan
Wanted = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # student's and teacher's logits


def _loss(op: Loss, definition: Wanted) -> Check:
    """Returns the check of an op: its loss and both gradients, and those of ``definition`` in float64."""

    def check(device: str, dtype: torch.dtype, plan: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        hidden, weight, teacher = _draw(device, dtype)
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        logits = [10 * torch.tanh(states @ exact[1].T / 10) for states in (exact[0], teacher.double())]
        wanted = _with_gradients(definition(logits[0], logits[1].detach()), *exact)
        return lambda: _with_gradients(op(hidden, weight, teacher, plan), hidden, weight), wanted

    return check


def _with_gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
    """The loss and its gradients with respect to ``leaves``, concatenated as one float64 vector."""
    gradients = torch.autograd.grad(loss.sum(), leaves)
    return torch.cat([part.detach().flatten().double() for part in (loss, *gradients)])


def _kl_of(z: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    return (z_t.softmax(-1) * (z_t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()


def _kl(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, plan: str) -> torch.Tensor:
    weight_t = weight.detach()
    return ops.linear_kl_div(hidden, weight, teacher, weight_t, student_softcap=10.0, teacher_softcap=10.0, plan=plan)


def _lse(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, plan: str) -> torch.Tensor:
    return ops.linear_lse(hidden, weight, softcap=10.0, plan=plan)


def _cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, plan: str) -> torch.Tensor:
    return ops.linear_cross_entropy(hidden, weight, torch.arange(5, device=hidden.device), softcap=10.0, plan=plan)


def _uniform_kl(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, plan: str) -> torch.Tensor:
    return ops.linear_uniform_kl(hidden, weight, softcap=10.0, plan=plan)


def _sparse_kl(hidden: torch.Tensor, weight: torch.Tensor, teacher: torch.Tensor, plan: str) -> torch.Tensor:
    everything = torch.arange(11, device=hidden.device).expand(5, 11)
    known = (10 * torch.tanh(teacher.double() @ weight.detach().double().T / 10)).log_softmax(-1)
    return ops.linear_sparse_kl_div(hidden, weight, everything, known, softcap=10.0, tail="renormalize", plan=plan)


def _noise(device: str, dtype: torch.dtype, plan: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    tensors = {"w": torch.ones(7, 5, device=device), "norm": torch.full((7,), 3.0, device=device)}
    with undo_kernels.backend("reference"):
        drawn = ops.replay("w", (7, 5), seed=1)

    def run() -> torch.Tensor:
        ops.noise_(tensors, alpha=0.5, beta=1.0, seed=1, toward=1.0)
        return torch.cat([t.flatten() for t in tensors.values()]).cpu()

    return run, torch.cat([0.5 + 0.5 * drawn.flatten(), torch.full((7,), 2.0)])


def _rmu(device: str, dtype: torch.dtype, plan: str) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Loss and gradient of ``rmu_loss``, and the values expected by its definition in float64."""
    hidden, _, teacher = _draw(device, dtype)
    mask = torch.tensor([True, False, True, True, True], device=device)
    difference = (hidden.detach().double() - 2 * teacher.double()) * mask[:, None]
    counted = 4 * hidden.shape[1]
    wanted = torch.cat([difference.square().sum()[None] / counted, (2 * difference / counted).flatten()])

    def run() -> torch.Tensor:
        return _with_gradients(ops.rmu_loss(hidden, teacher, coefficient=2.0, mask=mask, normalize="masked"), hidden)

    return run, wanted


# Float32 has 24 significant bits, of which sums of 32 products lose few. In bfloat16 a gradient may be rounded twice before the
# product that makes it and once after it, each time by at most half a unit of 2**-7.
_LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3 * 2.0**-8}
_FUSED: dict[str, Check] = {
    "linear_kl_div": _loss(_kl, _kl_of),
    "linear_lse": _loss(_lse, lambda z, z_t: z.logsumexp(-1)),
    "linear_cross_entropy": _loss(_cross_entropy, lambda z, z_t: -z.log_softmax(-1)[torch.arange(5), torch.arange(5)].mean()),
    "linear_uniform_kl": _loss(_uniform_kl, lambda z, z_t: -(z.log_softmax(-1).mean(-1) + math.log(z.shape[-1])).mean()),
    "linear_sparse_kl_div": _loss(_sparse_kl, _kl_of),
}
_CHECKS: dict[str, Check] = {**_FUSED, "noise_": _noise, "rmu_loss": _rmu}
