"""Several models of one shape trained side by side, whose trunks run as one batched pass.

A small model leaves most of a GPU idle: its kernels end before the next one is launched. Here the weights of ``K`` copies lie in one
tensor ``[K, ...]`` each, of which the copies' parameters are views, and ``torch.func.vmap`` runs their trunks with one launch where
one by one there are ``K``. Everything else is as in :func:`undo_core.training.train`, copy by copy: the data order, the fused loss of
the head, clipping, the optimizer and the evaluations. The results are the same to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.func import functional_call, vmap
from transformers import PreTrainedModel

from undo_core.distributed import head_ops
from undo_core.models import head_of, hidden_states
from undo_core.models.adapters import has_adapters
from undo_core.training.batches import Batch
from undo_core.training.loop import Steps, TrainResult, Wanted

_TRUNK = "model."


class _Trunk(nn.Module):
    """A model as the function from token ids to its final hidden states."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return hidden_states(self.model, ids)


class Together:
    """Computes the gradients of next-token cross-entropy of ``models``, whose parameters become views of stacked tensors.

    Args:
        models: models of one class and configuration, in one dtype, on one device. Their weights may differ.

    Memory: while the gradients are computed, the activations of all models at once, and a second gradient of their trunks.

    Raises:
        ValueError: the models differ in their parameters, have adapters or dropout; before anything is changed.
    """

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self.models = list(models)
        first = self.models[0]
        shapes = [{name: (p.shape, p.dtype, p.device) for name, p in model.named_parameters()} for model in self.models]
        if any(shape != shapes[0] for shape in shapes[1:]):
            raise ValueError(
                "models: got models whose parameters differ in name, shape, dtype or device, wanted copies of one model"
            )
        if any(map(has_adapters, self.models)):
            raise ValueError("models: got a model with adapters, wanted models whose weights are all their own")
        dropout = sorted({name for name, module in first.named_modules() if isinstance(module, nn.Dropout) and module.p > 0})
        if dropout or getattr(first.config, "attention_dropout", 0.0):
            raise ValueError(
                f"models: got dropout ({', '.join(dropout[:3]) or 'attention_dropout'}), wanted none: copies that run together would "
                "draw other masks than alone"
            )
        embedding = first.get_input_embeddings()
        self._padding = getattr(embedding, "padding_idx", None)
        self._embedding = next(name for name, p in first.named_parameters() if p is embedding.weight)
        self._buffers = {_TRUNK + name: buffer for name, buffer in first.named_buffers()}
        skeleton = copy.deepcopy(first)
        if embedding.weight.device.type == "cpu" and first.config._attn_implementation == "sdpa":
            skeleton.set_attn_implementation("eager")  # sdpa has no rule for vmap there, which would run the copies one by one
        if self._padding is not None:  # vmap would give the padding's row a gradient; it is removed in gradients()
            skeleton.get_input_embeddings().padding_idx = None
        self._trunk = _Trunk(skeleton.to("meta"))
        self._stacked: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def _stack(self) -> None:
        """Moves the parameters into stacked tensors; again if somebody has given a parameter other memory."""
        own = [dict(model.named_parameters()) for model in self.models]
        for name, parameter in own[0].items():
            stack = self._stacked.get(name)
            if stack is None or any(p[name].data_ptr() != part.data_ptr() for p, part in zip(own, stack, strict=True)):
                stack = torch.stack([p[name] for p in own])
                for p, part in zip(own, stack, strict=True):
                    p[name].data = part
                self._stacked[name] = stack.requires_grad_(parameter.requires_grad)

    def gradients(self, batches: Sequence[dict[str, Batch]], counted: Sequence[dict[str, int]]) -> list[torch.Tensor]:
        """Adds each model's gradient to its parameters' ``grad``; returns the detached losses.

        Args:
            batches: for each model its batches by source, of the same shapes for all.
            counted: for each model the number of labels by source.

        Raises:
            ValueError: batches of different shapes, or with an attention mask or positions.
        """
        self._stack()
        losses: list[torch.Tensor] = [torch.zeros(()) for _ in self.models]
        terms = []
        for source in batches[0]:
            shifted = [own[source].shifted() for own in batches]
            inputs = [ids for (ids, *rest), _, _ in shifted if all(column is None for column in rest)]
            if len(inputs) < len(self.models) or len({ids.shape for ids in inputs}) > 1:
                raise ValueError(
                    f"{source}: got batches of different shapes, or with an attention mask or positions, wanted token ids alone; "
                    "together: 1 trains them one by one"
                )
            weights = {_TRUNK + name: stack for name, stack in self._stacked.items()}
            hidden = self._hidden(weights, torch.stack(inputs))
            for model, states, (_, labels, mask), count in zip(self.models, hidden.unbind(), shifted, counted, strict=True):
                labels, total = labels.masked_fill(~mask, -100), float(max(sum(count.values()), 1))
                terms.append(head_ops.linear_cross_entropy(states, head_of(model), labels, normalizer=total))
        sum(terms).backward()
        self._spread()
        values = [term.detach() for term in terms]
        return [sum(values[index :: len(losses)]) for index in range(len(losses))]

    def _hidden(self, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        """The final hidden states ``[K, batch, length, d]``."""
        try:
            return vmap(self._run, in_dims=(0, 0))(weights, ids)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # vmap refuses operators without a rule, and values that decide what is computed
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"models: got {type(self.models[0]).__name__}, whose trunk torch.func.vmap cannot run ({reason}), wanted another model; "
                "together: 1 trains them one by one"
            ) from error

    def _run(self, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        return functional_call(self._trunk, {**weights, **self._buffers}, (ids,))

    @torch.no_grad()
    def _spread(self) -> None:
        """Adds the gradients of the stacked trunks to those of the copies, which hold their heads'."""
        own = [dict(model.named_parameters()) for model in self.models]
        for name, stack in self._stacked.items():
            gradient, stack.grad = stack.grad, None
            if gradient is None:
                continue
            if name == self._embedding and self._padding is not None:
                gradient[:, self._padding] = 0
            for parameters, part in zip(own, gradient.unbind(), strict=True):
                parameter = parameters[name]
                parameter.grad = part if parameter.grad is None else parameter.grad.add_(part)


def train_together(models: Sequence[PreTrainedModel], trainings: Sequence[Steps]) -> list[TrainResult]:
    """Runs trainings with next-token cross-entropy to their end, step by step together.

    Args:
        models: what they train, in the same order.
        trainings: what ``train.steps`` returned for each, with the same number of steps and no checkpoints.

    Raises:
        ValueError: see :class:`Together`.
        RuntimeError: they do not end at the same step.
    """
    wanted: list[Wanted] = []
    results: list[TrainResult] = []
    together: Together | None = None
    values: list[torch.Tensor | None] = [None] * len(trainings)
    try:
        while True:
            wanted.clear()
            for training, value in zip(trainings, values, strict=True):
                try:
                    wanted.append(training.send(value))
                except StopIteration as end:
                    results.append(end.value)
            if len(results) == len(trainings):
                return results
            if results:
                raise RuntimeError("trainings: got some that ended before others, wanted the same number of steps for all")
            together = together or Together(models)
            values = together.gradients([one.batches for one in wanted], [one.counted for one in wanted])
    finally:
        for training in trainings:
            training.close()  # leaves its contexts
