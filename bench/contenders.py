"""Contenders: ways from inputs to a loss, timed with and without gradients; and records of what ran."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import undo_kernels
from problems import Inputs, Outputs

ROUNDED = "rounds logits to 16 bits"
Loss = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss and, through autograd, both gradients.

    Attributes:
        name: name on the command line and in the results.
        label: name in tables and figures.
        build: makes, from the inputs, the timed function, which returns the loss; imports and buffers belong to ``build``.
        package: distribution that it needs, or None.
        module: a module of that distribution.
        gpu_only: whether it has no CPU path.
        softcap: whether it supports softcaps; if not, it runs the problem without one.
        compiles: whether its first step compiles.
        is_loss: False for the bare products, whose ``build`` gives the whole step, which is not verified.
        backend: backend of undo-core that it must run on, or None.
        differs: how its arithmetic differs with 16-bit inputs.
        note: further remarks for a reader.
    """

    name: str
    label: str
    build: Callable[[Inputs], Callable[[], Any]]
    package: str | None = None
    module: str | None = None
    gpu_only: bool = False
    softcap: bool = True
    compiles: bool = False
    is_loss: bool = True
    backend: str | None = None
    differs: str = ""
    note: str = ""

    def missing(self, device: str) -> str | None:
        """Returns why it cannot run here, or None."""
        if self.gpu_only and device == "cpu":
            return "GPU only: it has no CPU path"
        if self.module is None:
            return None
        try:
            importlib.import_module(self.module)
        except ImportError as error:
            if error.name == self.module.split(".")[0]:
                return f"not installed: pip install {self.package}"
            return f"not usable: {type(error).__name__}: {error}"
        return None

    def step(self, inputs: Inputs, mode: str = "both") -> Callable[[], Outputs]:
        """Returns the timed step: loss and both gradients, or with ``forward`` the loss alone without gradients."""
        run = self.build(inputs if mode == "both" else inputs.without_gradients())
        if not self.is_loss:
            return run

        def both() -> Outputs:
            loss = run()
            return loss.detach(), *torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight))

        def forward() -> Outputs:
            with torch.no_grad():
                return run(), *inputs.heads[:2]

        return both if mode == "both" else forward


def loader(module: str) -> Callable[[], Any]:
    """Returns a function that imports ``module`` when called."""
    return lambda: importlib.import_module(module)


# The auto-chunker's own thresholds leave alone what has fewer than 8 tokens for each column of width, as every row here has. What
# comes from a cache does not count as chunked.
_CHUNKING = {
    "auto_chunker.enable": True,
    "auto_chunker.amplify_ratio_threshold": 0,
    "auto_chunker.output_size_threshold": 0,
    "fx_graph_cache": False,
}


def auto_chunked(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Compiles a loss with Inductor's auto-chunker, which splits the joint graph of both passes along the tokens.

    Raises:
        RuntimeError: torch has no auto-chunker, or in the first call with gradients: it left the graph whole.
    """
    from torch._inductor import config, metrics

    if not hasattr(config, "auto_chunker"):
        raise RuntimeError(f"torch {torch.__version__} has no auto-chunker")
    compiled, seen = torch.compile(loss, fullgraph=True, dynamic=False, options=_CHUNKING), False

    def run(*arguments: Any) -> torch.Tensor:
        nonlocal seen
        before = metrics.num_auto_chunking
        value = compiled(*arguments)
        if value.requires_grad and not seen and metrics.num_auto_chunking == before:
            raise RuntimeError("Inductor's auto-chunker left the graph whole")
        seen = seen or value.requires_grad
        return value

    return run


def products(inputs: Inputs, teacher: bool) -> Callable[[], Outputs]:
    """Runs only the matrix products that every method needs: no softmax, and dW of the last chunk only."""
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    rows, chunk = hidden.shape[0], min(hidden.shape[0], 256 if hidden.device.type == "cpu" else 2048)
    z_s = hidden.new_empty(chunk, weight.shape[0])
    z_t = torch.empty_like(z_s) if teacher else None
    backward = inputs.student_weight.requires_grad
    d_hidden, d_weight = (torch.empty_like(t) if backward else t for t in (hidden, weight))

    def step() -> Outputs:
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            size = part.stop - start
            torch.mm(hidden[part], weight.T, out=z_s[:size])
            if teacher:
                torch.mm(inputs.teacher_hidden[part], inputs.teacher_weight.T, out=z_t[:size])
            if backward:
                torch.mm(z_s[:size], weight, out=d_hidden[part])
                torch.mm(z_s[:size].T, hidden[part], out=d_weight)
        return None, d_hidden, d_weight

    return step


def common(
    undo: Callable[[Inputs], Loss], plain: Callable[..., torch.Tensor], arguments: Callable[[Inputs], tuple[Any, ...]]
) -> list[Contender]:
    """Returns the contenders that every loss has: undo-core in its ways, and plain torch alone, compiled and chunked.

    Args:
        undo: makes, from the inputs, the loss of undo-core.
        plain: the loss in plain torch.
        arguments: makes, from the inputs, the arguments of ``plain``.
    """

    def on_backend(inputs: Inputs, backend: str) -> Loss:
        loss = undo(inputs)

        def run() -> torch.Tensor:
            with undo_kernels.backend(backend):
                return loss()

        return run

    def of_torch(inputs: Inputs, compiled: bool = False) -> Loss:
        loss = torch.compile(plain, fullgraph=True, dynamic=False) if compiled else plain
        return functools.partial(loss, *arguments(inputs))

    def chunked(inputs: Inputs) -> Loss:
        return functools.partial(auto_chunked(plain), *arguments(inputs))

    return [
        Contender("undo-core", "undo-core", undo),
        Contender("undo-core-workspace", "undo-core, workspace", undo, note="workspace: a tenth of plain torch's extra memory"),
        Contender(
            "undo-reference",
            "undo-core, reference",
            functools.partial(on_backend, backend="reference"),
            backend="reference",
        ),
        Contender("plain", "plain torch", of_torch, differs=ROUNDED),
        Contender("compile", "torch.compile", functools.partial(of_torch, compiled=True), compiles=True, differs=ROUNDED),
        Contender(
            "auto-chunker",
            "torch.compile, auto-chunker",
            chunked,
            compiles=True,
            differs=ROUNDED,
            note="made to chunk at every shape, into 8 parts; its own thresholds want 8 tokens for each column of width; "
            "without gradients it does not chunk",
        ),
    ]


Ran = list[dict[str, Any]]  # the kernels that ran in one call, each way once, as JSON values


def summarised(calls: Iterable[undo_kernels.Call]) -> Ran:
    """Returns backend, plan and form of recorded calls, each once and in order, without sizes, which may vary."""
    kept = ("op", "backend", "plan", "form", "gradient")
    found = [{name: getattr(call, name) for name in kept} for call in calls]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def observed(step: Callable[[], Any]) -> tuple[Any, Ran]:
    """Runs a step; returns its result and the kernels of undo-core that ran, none for other contenders."""
    with undo_kernels.recorded() as calls:
        outputs = step()
    return outputs, summarised(calls)


def watched(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measures memory; returns the measurement and what ran."""
    measured, ran = observed(measure)
    return measured | {"ran": ran}


def note_ran(record: dict[str, Any], mode: str, ran: Ran) -> None:
    """Records what a timed sample ran; all samples of a contender must run the same."""
    if record["ran"].setdefault(mode, ran) != ran:
        ways = " in one round and ".join(map(harness.path, (record["ran"][mode], ran)))
        raise harness.AnotherPath(f"{record['name']}, {mode}: ran {ways} in another")
