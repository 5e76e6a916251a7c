"""Contenders for the divergence between two heads, KL(teacher || student): undo-core and the alternatives."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from contenders import ROUNDED, Contender, Loss, common, loader, products
from problems import Inputs

from undo_core import ops

_LIGER, _TRL = "liger_kernel.transformers", "trl.kernels.chunked_divergence"


def _undo(inputs: Inputs, teacher_lse: bool = False) -> Loss:
    options = {
        "student_softcap": inputs.softcap,
        "teacher_softcap": inputs.softcap,
        "workspace_bytes": inputs.workspace_bytes,
        "plan": inputs.plan,
    }
    if teacher_lse:
        options["teacher_lse"] = ops.linear_lse(inputs.teacher_hidden, inputs.teacher_weight, softcap=inputs.softcap)

    def loss() -> torch.Tensor:
        return ops.linear_kl_div(*inputs.heads, **options)

    return loss


def plain_loss(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Forward KL in plain torch: logits in the inputs' dtype, softmax in float32."""
    student, teacher = student_hidden @ student_weight.T, (teacher_hidden @ teacher_weight.T).detach()
    if softcap is not None:
        student, teacher = softcap * torch.tanh(student / softcap), softcap * torch.tanh(teacher / softcap)
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _liger_chunked(inputs: Inputs) -> Loss:
    loss_class = loader("liger_kernel.chunked_loss")().LigerFusedLinearJSDLoss
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)  # beta 0 is KL(teacher || student)
    labels = torch.zeros_like(inputs.labels)
    return lambda: loss(*inputs.heads, labels)


def _liger_triton(inputs: Inputs) -> Loss:
    loss = loader(f"{_LIGER}.fused_linear_jsd")().LigerFusedLinearJSD(jsd_beta=0.0)
    return lambda: loss(*inputs.heads, None)


def _liger_kl(inputs: Inputs) -> Loss:
    loss = loader(f"{_LIGER}.fused_linear_kl_div")().LigerFusedLinearKLDivLoss(reduction="batchmean", eps=1e-38)

    def run() -> torch.Tensor:
        with torch.no_grad():
            target = (inputs.teacher_hidden @ inputs.teacher_weight.T).float().softmax(-1)
        return loss(*inputs.heads[:2], target)

    return run


def _trl(inputs: Inputs) -> Loss:
    function = loader(_TRL)().ChunkedDivergenceFunction
    student, teacher = (*inputs.heads[:2], None), (*inputs.heads[2:], None)
    # beta 0: KL(teacher || student); temperature, scales, softcaps
    options = (0.0, 1.0, 1.0, inputs.softcap, 1.0, inputs.softcap)
    return lambda: function.apply(*student, *teacher, *options)[0].mean()


CONTENDERS = {
    contender.name: contender
    for contender in (
        *common(_undo, plain_loss, lambda inputs: (*inputs.heads, inputs.softcap)),
        Contender(
            "undo-core-lse",
            "undo-core, teacher's lse given",
            functools.partial(_undo, teacher_lse=True),
            note="the teacher's log-sum-exps were computed before",
        ),
        Contender(
            "liger-chunked",
            "Liger chunked JSD",
            _liger_chunked,
            package="liger-kernel",
            module="liger_kernel.chunked_loss",
            softcap=False,
            compiles=True,
            differs="rounds logits, log-probabilities and loss to 16 bits",
            note="computes its gradients in the forward pass, also where nobody asks for them",
        ),
        Contender(
            "liger-triton",
            "Liger fused JSD",
            _liger_triton,
            package="liger-kernel",
            module=f"{_LIGER}.fused_linear_jsd",
            gpu_only=True,
            softcap=False,
        ),
        Contender(
            "liger-kl",
            "Liger fused KL",
            _liger_kl,
            package="liger-kernel",
            module=f"{_LIGER}.fused_linear_kl_div",
            gpu_only=True,
            softcap=False,
            differs=ROUNDED,
            note="wants the teacher's probabilities, [tokens, V], which torch computes in its timed step",
        ),
        Contender(
            "trl",
            "TRL chunked divergence",
            _trl,
            package="trl",
            module=_TRL,
            note="on a CPU its tiles run in plain PyTorch, not in its Triton kernels",
        ),
        Contender(
            "products",
            "four bare products",
            functools.partial(products, teacher=True),
            is_loss=False,
            note="no softmax, no loss; two products of the forward pass",
        ),
    )
}
