"""Low-rank adapters by peft: only they are trained, then merged, so that the model keeps its parameter names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from undo_core import distributed
from undo_core.attacks.config import LoraConfig, check_installed
from undo_core.models.adapters import has_adapters


def insert(model: PreTrainedModel, settings: LoraConfig, seed: int) -> tuple[Any, list[nn.Parameter]]:
    """Inserts adapters at the linear layers of ``model`` (``Linear``, or GPT-2's ``Conv1D``) without changing its outputs.

    With pissa, weight and adapter add up to the weight as it was, to rounding; with the others the adapters add 0 at first.

    Returns:
        peft's object, whose ``merge_and_unload`` merges and removes the adapters, and the parameters to train. All others are
        frozen.

    Memory: ``rank * (in + out)`` elements for each adapted ``[out, in]`` matrix.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: a name in ``settings.targets`` is not that of a linear layer, or the model has adapters already.
    """
    check_installed("lora")
    if has_adapters(model):
        raise ValueError(
            "kind: got lora for a model that has adapters already, wanted finetune, which trains them, or a model into which "
            "they are merged (merge_and_unload)"
        )
    linear, transposed = (
        {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, kind)}
        for kind in (nn.Linear, Conv1D)
    )
    if unknown := set(settings.targets) - linear - transposed:
        names = ", ".join(sorted(linear | transposed))
        raise ValueError(f"lora.targets: got {sorted(unknown)}, wanted names of linear layers: {names}")
    from peft import LoraConfig as PeftConfig
    from peft import LoraModel

    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=settings.targets or "all-linear",
        use_rslora=settings.rank_stabilised,
        init_lora_weights=True if settings.initialisation == "kaiming" else settings.initialisation,
        fan_in_fan_out=bool(transposed.intersection(settings.targets or transposed)),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, {"default": config}, "default")
    return tuner, [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def adapted(model: PreTrainedModel, settings: LoraConfig, seed: int) -> Iterator[list[nn.Parameter]]:
    """Context in which ``model`` has adapters; yields the parameters to train, and merges the adapters on exit.

    After an error on one of several ranks they are left unmerged: merging shards needs all ranks, and the others do not come.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuner, parameters = insert(model, settings, seed)
    try:
        yield parameters
    except BaseException:
        if distributed.count() == 1:
            _merge(tuner, before)
        raise
    _merge(tuner, before)


def _merge(tuner: Any, before: list[tuple[nn.Parameter, bool]]) -> None:
    """Adds the adapters to the weights, and restores which parameters are trained."""
    tuner.merge_and_unload()
    for parameter, required in before:
        parameter.requires_grad_(required)
