"""Several processes that train one model: their process group, sharded models, and what must be alike on every rank."""

from undo_core.distributed.config import ParallelConfig
from undo_core.distributed.ranks import (
    OtherRankFailed,
    arrange,
    check_joined,
    count,
    end,
    explained,
    first_to_fail,
    gather,
    layout,
    on_first,
    rank,
    share,
    start,
    stop,
    tensor,
    total,
)
from undo_core.distributed.replicas import in_forward

__all__ = [
    "OtherRankFailed",
    "ParallelConfig",
    "arrange",
    "check_joined",
    "count",
    "end",
    "explained",
    "first_to_fail",
    "gather",
    "in_forward",
    "layout",
    "on_first",
    "rank",
    "share",
    "start",
    "stop",
    "tensor",
    "total",
]
