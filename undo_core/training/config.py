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
    """Settings of one training stage.

    Attributes:
        steps: largest number of optimizer steps; a stage with a stop rule may end earlier.
        batch_size: rows of each source in an optimizer step.
        micro_batch_size: rows in one forward and backward pass; None for the whole batch. The gradient does not depend on it,
            except through dropout, and with ``robust: repnoise`` in unlearning, whose terms are computed per micro-batch.
        lr: peak learning rate.
        min_lr: learning rate reached at ``steps`` by the decaying schedules; None for 0.
        schedule: shape of the learning rate after the warm-up.
        warmup: steps of linear warm-up from 0.
        weight_decay: applied to every parameter, as published; sgd adds it to the gradient, the other optimizers decouple it.
        beta1: decay of the first moment of AdamW; the momentum of sgd.
        beta2: decay of the second moment of AdamW.
        eps: added to the denominator of AdamW.
        clip: largest norm of the gradient; 0 disables clipping.
        attention: attention kernel: eager, sdpa, flash_attention_2 or flex_attention; auto is transformers' choice, or eager
            for a model whose attention has a softcap, which sdpa would drop.
        activation_checkpointing: keep only each layer's input and run the layer again in the backward pass.
        precision: float32; bfloat16-master (bfloat16 weights, float32 masters and gradients); bfloat16-stochastic (bfloat16
            throughout, updates rounded stochastically); bfloat16 (rounded to nearest: an update below half the spacing of
            bfloat16 at a weight is lost, as in the published attack). Training leaves the model in the dtype of its weights.
        optimizer: adamw; adamw-8bit and adamw-4bit quantise the moments (they need the extra ``lowmem``); adamw-offload keeps
            masters, gradients and moments in host memory and steps there (on a CPU it equals adamw); sgd has one moment;
            adafactor (torch's, whose step is the rate times the weights' root mean square) has almost no optimizer state.
        step_in_backward: update each parameter within the backward pass and free its gradient at once; not with micro-batches.
            The norm of the whole gradient is then known too late, so ``clip`` scales each gradient by min(1, clip / norm),
            where norm is the larger of the previous step's norm and the norm of this step's gradients so far. A spike is
            clipped, except in the first gradients of its step.
        eval_every: steps between evaluations; 0 evaluates only at the start and the end.
        seed: seed of the data order and of all other random draws of the stage; None derives it from the run's seed and the
            stage's name.
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
                f"step_in_backward: got true with micro_batch_size {self.micro_batch_size}, wanted micro_batch_size null: a step in the "
                "backward pass cannot wait for the gradients of further micro-batches"
            )
        _at_least("warmup", self.warmup, 0)
        _at_least("eval_every", self.eval_every, 0)

    def rate(self, step: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        low = self.min_lr or 0.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return low + (self.lr - low) * left


def check_mode(precision: str, optimizer: str) -> None:
    """Raises a ValueError unless both are known and go together."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: got {optimizer!r}, wanted one of {', '.join(OPTIMIZERS)}")
    if precision == "bfloat16-stochastic" and not optimizer.startswith("adamw"):
        raise ValueError(
            f"optimizer: got {optimizer} with precision bfloat16-stochastic, wanted an adamw optimizer: only these round stochastically"
        )


def _at_least(name: str, value: int, low: int) -> None:
    if not (isinstance(value, int) and value >= low):
        raise ValueError(f"{name}: got {value}, wanted an integer >= {low}")
