"""Contenders for the cross-entropy of a head's logits: undo-core and the alternatives."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from contenders import ROUNDED, Contender, Loss, common, loader, products
from problems import Inputs

from undo_core import ops

_LIGER, _TRL = "liger_kernel.transformers.fused_linear_cross_entropy", "trl.kernels.chunked_logprob"


def _undo(inputs: Inputs) -> Loss:
    def loss() -> torch.Tensor:
        return ops.linear_cross_entropy(
            *inputs.heads[:2], inputs.labels, softcap=inputs.softcap, workspace_bytes=inputs.workspace_bytes, plan=inputs.plan
        )

    return loss


def plain_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Cross-entropy in plain torch: logits in the inputs' dtype, softmax in float32."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.float(), labels)


def _torch_chunked(inputs: Inputs) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(*inputs.heads[:2], inputs.labels, options=options)


def _liger(inputs: Inputs) -> Loss:
    loss = loader(_LIGER)().LigerFusedLinearCrossEntropyLoss(softcap=inputs.softcap)
    return lambda: loss(inputs.student_weight, inputs.student_hidden, inputs.labels)


def _trl(inputs: Inputs) -> Loss:
    function = loader(_TRL)().ChunkedLogProbFunction
    # no bias; temperature, vocabulary entries of a tile, softcap, scale, no further outputs
    options = (1.0, TRL_TILE, inputs.softcap, 1.0, ())
    return lambda: -function.apply(*inputs.heads[:2], None, inputs.labels, *options)[0].mean()


def _cce(inputs: Inputs) -> Loss:
    function = loader("cut_cross_entropy")().linear_cross_entropy
    return lambda: function(*inputs.heads[:2], inputs.labels, softcap=inputs.softcap)


TRL_TILE = 32768  # as its trainers pass it
CONTENDERS = {
    contender.name: contender
    for contender in (
        *common(_undo, plain_loss, lambda inputs: (*inputs.heads[:2], inputs.labels, inputs.softcap)),
        Contender(
            "torch-chunked",
            "torch linear_cross_entropy",
            _torch_chunked,
            softcap=False,
            differs="rounds logits to 16 bits and adds the loss up in 16 bits",
        ),
        Contender("liger", "Liger fused", _liger, package="liger-kernel", module=_LIGER, gpu_only=True),
        Contender(
            "trl",
            "TRL chunked log-probs",
            _trl,
            package="trl",
            module=_TRL,
            differs=ROUNDED,
            note="on a CPU its tiles run in plain PyTorch, not in its Triton kernels",
        ),
        Contender(
            "cce",
            "Cut Cross-Entropy",
            _cce,
            package="cut-cross-entropy",
            module="cut_cross_entropy",
            gpu_only=True,
            note="skips gradient blocks below its threshold, as it does by default",
        ),
        Contender(
            "products",
            "three bare products",
            functools.partial(products, teacher=False),
            is_loss=False,
            note="no softmax, no loss; one product of the forward pass",
        ),
    )
}
