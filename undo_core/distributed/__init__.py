"""Several processes that train one model: their process group, sharded models, and what must be alike on every rank."""

from undo_core.distributed.ranks import (
    OtherRankFailed,
    check_joined,
    count,
    end,
    explained,
    first_to_fail,
    gather,
    on_first,
    rank,
    share,
    start,
    stop,
    total,
)

__all__ = [
    "OtherRankFailed",
    "check_joined",
    "count",
    "end",
    "explained",
    "first_to_fail",
    "gather",
    "on_first",
    "rank",
    "share",
    "start",
    "stop",
    "total",
]
