"""The contenders: undo-core, and what a user would take instead of it, each as one step from inputs to loss and gradients."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import undo_kernels

from undo_core import ops

Outputs = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """One problem. The student's two tensors are leaves that require gradients.

    Attributes:
        student_hidden: ``[N, d_s]``.
        student_weight: ``[V, d_s]``.
        teacher_hidden: ``[N, d_t]``.
        teacher_weight: ``[V, d_t]``.
        softcap: of both logits, or None.
        workspace_bytes: for the contenders that take one.
    """

    student_hidden: torch.Tensor
    student_weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor
    softcap: float | None = None
    workspace_bytes: int | None = None

    @property
    def output_bytes(self) -> int:
        """Of the two gradients."""
        return sum(t.numel() * t.element_size() for t in (self.student_hidden, self.student_weight))

    def without_softcap(self) -> Inputs:
        return replace(self, softcap=None)


@dataclass(frozen=True)
class Contender:
    """One way to compute the loss and both gradients.

    Attributes:
        name: on the command line and in the results.
        label: for people.
        build: from inputs to the step that is timed; imports and buffers belong to it.
        package: distribution that it needs, or None.
        softcap: whether it knows softcaps; without, it runs the problem without one.
        compiles: whether its first step compiles.
        is_loss: False for the bare products, which nothing verifies.
        differs: what sets its arithmetic apart where the inputs have 16 bits.
        note: what else a reader must know.
    """

    name: str
    label: str
    build: Callable[[Inputs], Callable[[], Outputs]]
    package: str | None = None
    softcap: bool = True
    compiles: bool = False
    is_loss: bool = True
    differs: str = ""
    note: str = ""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.package is None:
            return None
        try:
            importlib.import_module(_MODULES[self.name])
        except ImportError as error:
            if error.name == _MODULES[self.name].split(".")[0]:
                return f"not installed: pip install {self.package}"
            return f"not usable: {type(error).__name__}: {error}"
        return None


def _gradients(inputs: Inputs, loss: torch.Tensor) -> Outputs:
    return loss.detach(), *torch.autograd.grad(loss, (inputs.student_hidden, inputs.student_weight))


def _undo(inputs: Inputs, backend: str | None = None, teacher_lse: bool = False) -> Callable[[], Outputs]:
    heads = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    options = {
        "student_softcap": inputs.softcap,
        "teacher_softcap": inputs.softcap,
        "workspace_bytes": inputs.workspace_bytes,
    }
    if teacher_lse:
        options["teacher_lse"] = ops.linear_lse(inputs.teacher_hidden, inputs.teacher_weight, softcap=inputs.softcap)

    def step() -> Outputs:
        return _gradients(inputs, ops.linear_kl_div(*heads, **options))

    def on_backend() -> Outputs:
        with undo_kernels.backend(backend):
            return step()

    return step if backend is None else on_backend


def plain_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Forward KL as one writes it in torch; logits in the inputs' dtype, softmax in float32."""
    student, teacher = student_hidden @ student_weight.T, (teacher_hidden @ teacher_weight.T).detach()
    if softcap is not None:
        student, teacher = softcap * torch.tanh(student / softcap), softcap * torch.tanh(teacher / softcap)
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _plain(inputs: Inputs, compiled: bool = False) -> Callable[[], Outputs]:
    loss = torch.compile(plain_loss, fullgraph=True, dynamic=False) if compiled else plain_loss
    heads = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    return lambda: _gradients(inputs, loss(*heads, inputs.softcap))


def _liger_chunked(inputs: Inputs) -> Callable[[], Outputs]:
    loss_class = importlib.import_module(_MODULES["liger-chunked"]).LigerFusedLinearJSDLoss
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)  # beta 0 is KL(teacher || student)
    labels = torch.zeros(inputs.student_hidden.shape[0], dtype=torch.long, device=inputs.student_hidden.device)
    heads = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    return lambda: _gradients(inputs, loss(*heads, labels))


def _liger_triton(inputs: Inputs) -> Callable[[], Outputs]:
    loss = importlib.import_module(_MODULES["liger-triton"]).LigerFusedLinearJSD(jsd_beta=0.0)
    heads = (inputs.student_hidden, inputs.student_weight, inputs.teacher_hidden, inputs.teacher_weight)
    return lambda: _gradients(inputs, loss(*heads, None))


def _trl(inputs: Inputs) -> Callable[[], Outputs]:
    function = importlib.import_module(_MODULES["trl"]).ChunkedDivergenceFunction
    student = (inputs.student_hidden, inputs.student_weight, None)
    teacher = (inputs.teacher_hidden, inputs.teacher_weight, None)
    options = (
        0.0,
        1.0,
        1.0,
        inputs.softcap,
        1.0,
        inputs.softcap,
    )  # beta 0: KL(teacher || student); temperature, scales, softcaps
    return lambda: _gradients(inputs, function.apply(*student, *teacher, *options)[0].mean())


def _products(inputs: Inputs) -> Callable[[], Outputs]:
    """The four matrix products that every method owes, and nothing else: no softmax, dW of the last chunk only."""
    hidden, weight = inputs.student_hidden.detach(), inputs.student_weight.detach()
    teacher_hidden, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
    rows, chunk = hidden.shape[0], min(hidden.shape[0], 256 if hidden.device.type == "cpu" else 2048)
    z_s = hidden.new_empty(chunk, weight.shape[0])
    z_t, d_hidden, d_weight = torch.empty_like(z_s), torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> Outputs:
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            size = part.stop - start
            torch.mm(hidden[part], weight.T, out=z_s[:size])
            torch.mm(teacher_hidden[part], teacher_weight.T, out=z_t[:size])
            torch.mm(z_s[:size], weight, out=d_hidden[part])
            torch.mm(z_s[:size].T, hidden[part], out=d_weight)
        return None, d_hidden, d_weight

    return step


_MODULES = {
    "liger-chunked": "liger_kernel.chunked_loss",
    "liger-triton": "liger_kernel.transformers.fused_linear_jsd",
    "trl": "trl.kernels.chunked_divergence",
}
_ROUNDED = "rounds logits to 16 bits"

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("undo-core", "undo-core", _undo),
        Contender(
            "undo-core-workspace", "undo-core, workspace", _undo, note="workspace: a tenth of plain torch's extra memory"
        ),
        Contender(
            "undo-core-lse",
            "undo-core, teacher's lse given",
            functools.partial(_undo, teacher_lse=True),
            note="the teacher's log-sum-exps were computed before",
        ),
        Contender("undo-reference", "undo-core, reference", functools.partial(_undo, backend="reference")),
        Contender("plain", "plain torch", _plain, differs=_ROUNDED),
        Contender("compile", "torch.compile", functools.partial(_plain, compiled=True), compiles=True, differs=_ROUNDED),
        Contender(
            "liger-chunked",
            "Liger chunked JSD",
            _liger_chunked,
            package="liger-kernel",
            softcap=False,
            compiles=True,
            differs="rounds logits, log-probabilities and loss to 16 bits",
        ),
        Contender("liger-triton", "Liger fused JSD", _liger_triton, package="liger-kernel", softcap=False),
        Contender("trl", "TRL chunked divergence", _trl, package="trl"),
        Contender("products", "four bare products", _products, is_loss=False, note="the floor: no softmax, no loss"),
    )
}


def used_backend(device: str, dtype: torch.dtype) -> str:
    """The backend that the default resolves to here: what the device prefers, if it takes such a call without falling back."""
    wanted = undo_kernels.requested_backend() or ("cpu" if device == "cpu" else "triton")
    hidden = torch.ones(2, 8, dtype=dtype, device=device)
    weight = torch.ones(3, 8, dtype=dtype, device=device)
    undo_kernels.library._warned.clear()  # a fallback says so once; the question is put for several dtypes
    with warnings.catch_warnings(record=True) as caught, undo_kernels.backend(wanted):
        warnings.simplefilter("always")
        ops.linear_kl_div(hidden, weight, hidden, weight)
    return "reference" if any(issubclass(w.category, undo_kernels.BackendWarning) for w in caught) else wanted
