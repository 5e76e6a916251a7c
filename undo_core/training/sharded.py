"""Training on several ranks: what is refused, and the sharded model with its trained parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from undo_core import distributed
from undo_core.distributed.sharding import measure, shard
from undo_core.models.adapters import has_adapters
from undo_core.training.config import TrainConfig
from undo_core.training.precision import convert_, weight_dtype

OPTIMIZERS = ("adamw", "sgd")  # each element is updated by itself, so that a shard is updated as in the whole tensor


def check_ranks(config: TrainConfig, sizes: Iterable[int], count: int) -> None:
    """Checks that a stage can be trained on ``count`` ranks.

    Args:
        config: the stage's training settings.
        sizes: sequences of each source in a step.
        count: number of ranks.

    Raises:
        ValueError: a setting that is not supported on several ranks, or a micro-batch with fewer sequences than ranks.
    """
    if count == 1:
        return
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer: got {config.optimizer} on {count} ranks, wanted {' or '.join(OPTIMIZERS)}, the ones that work on shards"
        )
    if config.step_in_backward:
        raise ValueError(
            f"step_in_backward: got true on {count} ranks, wanted false, because clipping needs the gradients of all ranks first"
        )
    for size in sizes:
        micro = min(config.micro_batch_size or size, size)
        least = min(micro, size % micro or micro)  # the last micro-batch holds the rest
        if least < count:
            raise ValueError(
                f"micro_batch_size: got micro-batches of {least} sequences on {count} ranks, wanted at least {count} in each: every "
                "rank takes a part of each micro-batch"
            )


def sharded(model: nn.Module, trained: list[nn.Parameter], config: TrainConfig) -> list[nn.Parameter]:
    """Shards ``model`` for training, and returns the trained parameters, which are new objects.

    With bfloat16-master, the shards of trained parameters are the float32 masters themselves; they are gathered in bfloat16.

    Raises:
        ValueError: a model that cannot be sharded.
    """
    mastered, count = config.precision == "bfloat16-master", distributed.count()
    if mastered and has_adapters(model):
        raise ValueError(
            f"precision: got bfloat16-master for a model with adapters on {count} ranks, wanted float32 or bfloat16"
        )
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(f"model: got {type(model).__name__} with the scalar parameter {scalars[0]}, which cannot be sharded")
    chosen = {id(parameter) for parameter in trained}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    masters = [parameter.data.float() for parameter in trained] if mastered else []
    convert_(model, config.precision)
    measure(model)  # while all parameters have one dtype
    for parameter, master in zip(trained, masters, strict=mastered):
        parameter.data = master.contiguous()
    shard(model, weight_dtype(config.precision) if mastered else None)
    named = dict(model.named_parameters())
    return [named[name] for name in names]
