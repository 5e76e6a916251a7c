"""``undo doctor``: versions, devices and backends, and whether each op works on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import undo_kernels
from rich.console import Console
from rich.table import Table

from undo_core import ops
from undo_core.store import machine, usable_cores
from undo_core.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "pyarrow")


def run_doctor() -> int:
    """Print the examination; 0 when the pipeline can run here, 1 otherwise, with a line per problem."""
    console = Console(highlight=False, soft_wrap=True)
    problems: list[str] = []
    console.print(_facts())
    table = Table(box=None, pad_edge=False)
    table.add_column("op")
    for name in undo_kernels.library.BACKENDS:
        table.add_column(name)
    for op, check in _CHECKS.items():
        cells = []
        for name in undo_kernels.library.BACKENDS:
            verdict = _verdict(op, name, check)
            if verdict not in ("ok", "-") and name == "reference":
                problems.append(f"{op} fails on the reference backend: {verdict}")
            cells.append(verdict)
        table.add_row(op, *cells)
    console.print(table)
    for name, reason in undo_kernels.unavailable().items():
        console.print(f"{name}: {reason}")
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
    table.add_row(
        "processor", f"{facts['device']}, {usable_cores()} cores, torch uses {facts['threads']} threads"
    )
    table.add_row("vector units", torch.backends.cpu.get_cpu_capability())
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    table.add_row(
        "GPUs", ", ".join(f"{g.name} ({g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor})" for g in gpus) or "none"
    )
    memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB" if hasattr(os, "sysconf") else "unknown"
    table.add_row("memory", f"{memory}; {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free on this disk")
    table.add_row("C++ compiler", shutil.which(os.environ.get("CXX", "c++")) or "none")
    table.add_row(
        "backend asked for", undo_kernels.requested_backend() or "none: C++ on CPUs, Triton on GPUs, else the reference"
    )
    return table


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdict(op: str, name: str, check: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> str:
    fused = op in _FUSED
    if name not in undo_kernels.backends_of("vocab_loss" if fused else op) and not (fused and name == "reference"):
        return "-"
    if name in undo_kernels.unavailable():
        return "not here"
    try:
        with undo_kernels.backend(name):
            # A vocabulary this small would take the direct plan on its own.
            got, wanted = check(plan="direct" if name == "reference" else "chunk") if fused else check()
        error = float((got.double() - wanted).norm() / wanted.norm())
    except Exception as error:  # whatever an op raises here is the finding
        return f"{type(error).__name__}: {error}"
    return "ok" if error < 1e-5 else f"wrong: relative error {error:.1g}"


def _draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    weight = torch.randn(11, 4, generator=generator)
    z, z_t = (10 * torch.tanh(h.double() @ weight.double().T / 10) for h in (hidden, teacher))
    return hidden, teacher, weight, z, z_t


def _kl(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, teacher, weight, z, z_t = _draw()
    got = ops.linear_kl_div(hidden, weight, teacher, weight, student_softcap=10.0, teacher_softcap=10.0, plan=plan)
    return got, (z_t.softmax(-1) * (z_t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()


def _lse(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, weight, z, _ = _draw()
    return ops.linear_lse(hidden, weight, softcap=10.0, plan=plan), z.exp().sum(-1).log()


def _cross_entropy(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, weight, z, _ = _draw()
    labels = torch.arange(5)
    return ops.linear_cross_entropy(hidden, weight, labels, softcap=10.0, plan=plan), -z.log_softmax(-1)[labels, labels].mean()


def _uniform_kl(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, weight, z, _ = _draw()
    wanted = -(z.log_softmax(-1).mean(-1) + torch.log(torch.tensor(11.0, dtype=torch.float64))).mean()
    return ops.linear_uniform_kl(hidden, weight, softcap=10.0, plan=plan), wanted


def _sparse_kl(plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, weight, z, z_t = _draw()
    everything = torch.arange(11).expand(5, 11)
    got = ops.linear_sparse_kl_div(hidden, weight, everything, z_t.log_softmax(-1), softcap=10.0, tail="renormalize", plan=plan)
    return got, (z_t.softmax(-1) * (z_t.log_softmax(-1) - z.log_softmax(-1))).sum(-1).mean()


def _noise() -> tuple[torch.Tensor, torch.Tensor]:
    tensors = {"w": torch.ones(7, 5), "norm": torch.full((7,), 3.0)}
    ops.noise_(tensors, alpha=0.5, beta=1.0, seed=1, toward=1.0)
    with undo_kernels.backend("reference"):
        drawn = ops.replay("w", (7, 5), seed=1)
    return torch.cat([t.flatten() for t in tensors.values()]), torch.cat([0.5 + 0.5 * drawn.flatten(), torch.full((7,), 2.0)])


def _rmu() -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient."""
    hidden, teacher, *_ = _draw()
    mask = torch.tensor([True, False, True, True, True])
    loss = ops.rmu_loss(hidden.requires_grad_(), teacher, coefficient=2.0, mask=mask, normalize="masked")
    difference = (hidden.detach().double() - 2 * teacher.double()) * mask[:, None]
    got = torch.cat([loss.detach()[None], torch.autograd.grad(loss, hidden)[0].flatten()])
    return got, torch.cat([difference.square().sum()[None] / 16, (difference / 8).flatten()])


_FUSED = ("linear_kl_div", "linear_lse", "linear_cross_entropy", "linear_uniform_kl", "linear_sparse_kl_div")
_CHECKS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "linear_kl_div": _kl,
    "linear_lse": _lse,
    "linear_cross_entropy": _cross_entropy,
    "linear_uniform_kl": _uniform_kl,
    "linear_sparse_kl_div": _sparse_kl,
    "noise_": _noise,
    "rmu_loss": _rmu,
}
