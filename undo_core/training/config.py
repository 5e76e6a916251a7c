"""Settings of a training stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from undo_core.training.precision import PRECISIONS, Precision

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
OptimizerName = Literal["adamw", "adamw-8bit", "adamw-4bit", "adamw-offload", "sgd", "adafactor"]
OPTIMIZERS = ("adamw", "adamw-8bit", "adamw-4bit", "adamw-offload", "sgd", "adafactor")


@dataclass(frozen=True)
class TrainConfig:
    """How one stage trains.

    Attributes:
        steps: maximum number of optimizer steps; a stop rule may end the stage earlier.
        batch_size: sequences of each source in an optimizer step.
        micro_batch_size: sequences in one forward and backward pass; None for the whole batch. It does not change the gradient,
            with two exceptions: dropout draws other masks, and unlearning with ``robust: repnoise`` computes its terms per
            micro-batch.
        lr: peak learning rate.
        min_lr: learning rate at ``steps``, for the decaying schedules; None for 0.
        schedule: shape of the learning rate after the warm-up.
        warmup: steps of linear warm-up from 0.
        weight_decay: applied to every parameter, as published; sgd adds it to the gradient, the other optimizers to the step.
        beta1: decay of AdamW's first moment; the momentum of sgd.
        beta2: decay of AdamW's second moment.
        eps: term in the denominator of AdamW's step.
        clip: largest norm of the gradient; 0 switches clipping off.
        attention: attention kernel: eager, sdpa, flash_attention_2 or flex_attention. auto leaves the choice to transformers,
            but takes eager for a model whose attention has a softcap, because sdpa ignores it.
        activation_checkpointing: keep only the input of each layer and run the layer again in the backward pass.
        precision: float32; bfloat16-master (bfloat16 weights, float32 masters and gradients); bfloat16-stochastic (bfloat16
            throughout, updates rounded stochastically); bfloat16 (updates rounded to nearest: one smaller than half the spacing
            of bfloat16 numbers at a weight is lost, as in the published attack). The trained model keeps the dtype of its
            weights.
        optimizer: adamw; adamw-8bit and adamw-4bit quantise the moments (extra ``lowmem``); adamw-offload keeps masters,
            gradients and moments in host memory and steps there (the same as adamw on a CPU); sgd has one moment; adafactor
            (torch's, whose step is the learning rate times the root mean square of the weights) has almost none.
        step_in_backward: update each parameter during the backward pass and free its gradient at once; excludes micro-batches.
            The norm of all gradients is known too late then, so ``clip`` scales each gradient by min(1, clip / norm) with the
            larger of two norms: that of the previous step, and that of the gradients seen so far in this one. A spike is
            clipped, except in the first gradients that show it.
        eval_every: steps between evaluations; 0 evaluates at the start and at the end only.
        seed: seed of the data order and of every other draw of the stage; None derives it from the run's seed and the stage's
            name.
    """

    steps: int = 1000
    batch_size: int = 64
    micro_batch_size: int | None = None
    lr: float = 1e-3
    min_lr: float | None = None
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    activation_checkpointing: bool = False
    precision: Precision = "float32"
    optimizer: OptimizerName = "adamw"
    step_in_backward: bool = False
    eval_every: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 0)
        _at_least("batch_size", self.batch_size, 1)
        if self.micro_batch_size is not None:
            _at_least("micro_batch_size", self.micro_batch_size, 1)
        for name in ("lr", "min_lr", "weight_decay", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, wanted a finite number >= 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"{name}: got {value}, wanted a number in [0, 1)")
        if self.schedule not in ("constant", "cosine", "linear"):
            raise ValueError(f"schedule: got {self.schedule!r}, wanted constant, cosine or linear")
        if self.attention != "auto" and self.attention not in ATTENTION:
            raise ValueError(f"attention: got {self.attention!r}, wanted auto, {', '.join(ATTENTION)}")
        check_mode(self.precision, self.optimizer)
        if self.step_in_backward and self.micro_batch_size is not None:
            raise ValueError(
                f"step_in_backward: got true with micro_batch_size {self.micro_batch_size}, wanted micro_batch_size null: a "
                "step in the backward pass cannot wait for the gradients of the other micro-batches"
            )
        _at_least("warmup", self.warmup, 0)
        _at_least("eval_every", self.eval_every, 0)

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step`` (from 0)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        low = self.min_lr or 0.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return low + (self.lr - low) * left


def check_mode(precision: str, optimizer: str) -> None:
    """Raises a ValueError unless precision and optimizer are known and can be combined."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: got {optimizer!r}, wanted one of {', '.join(OPTIMIZERS)}")
    if precision == "bfloat16-stochastic" and not optimizer.startswith("adamw"):
        raise ValueError(f"optimizer: got {optimizer} with precision bfloat16-stochastic, wanted adamw or a variant of it")


def _at_least(name: str, value: int, low: int) -> None:
    if not (isinstance(value, int) and value >= low):
        raise ValueError(f"{name}: got {value}, wanted an integer >= {low}")
