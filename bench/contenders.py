"""What a contender is: one way from inputs to a loss, timed with and without its gradients; and what ran when it was called."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import harness
import torch
import undo_kernels
from problems import Inputs, Outputs


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss and, through autograd, both gradients.

    Attributes:
        name: on the command line and in the results.
        label: for people.
        build: from inputs to the function that is timed, which returns the loss; imports and buffers belong to ``build``.
        package: distribution that it needs, or None.
        module: of that distribution.
        gpu_only: whether it has no CPU path.
        softcap: whether it knows softcaps; without, it runs the problem without one.
        compiles: whether its first step compiles.
        is_loss: False for the bare products: ``build`` gives the whole step, and nothing verifies it.
        backend: of undo-core's that it must run on, or None.
        differs: what sets its arithmetic apart where the inputs have 16 bits.
        note: what else a reader must know.
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
        """Why it cannot run here, or None."""
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
        """The step that is timed: loss and both gradients, or the loss alone with gradients off (``forward``)."""
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
    """Imports ``module`` when it is called."""
    return lambda: importlib.import_module(module)


def products(inputs: Inputs, teacher: bool) -> Callable[[], Outputs]:
    """The matrix products that every method owes, and nothing else: no softmax, dW of the last chunk only."""
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


Ran = list[dict[str, Any]]  # of one call: the kernels that ran, each way once, as JSON has it


def summarised(calls: Iterable[undo_kernels.Call]) -> Ran:
    """Backend, plan and form of recorded calls, each once and in order; sizes are left out, for problems of several sizes."""
    kept = ("op", "backend", "plan", "form", "gradient")
    found = [{name: getattr(call, name) for name in kept} for call in calls]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def observed(step: Callable[[], Any]) -> tuple[Any, Ran]:
    """What a step returns, and which of undo-core's kernels it ran: none for the others."""
    with undo_kernels.recorded() as calls:
        outputs = step()
    return outputs, summarised(calls)


def watched(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A measurement of memory, and what ran in it."""
    measured, ran = observed(measure)
    return measured | {"ran": ran}


def note_ran(record: dict[str, Any], mode: str, ran: Ran) -> None:
    """Every timed sample of a contender must be of one and the same path."""
    if record["ran"].setdefault(mode, ran) != ran:
        ways = " in one round and ".join(map(harness.path, (record["ran"][mode], ran)))
        raise harness.AnotherPath(f"{record['name']}, {mode}: ran {ways} in another")
