"""The processes that train one model together: their number, what the first of them decides, and how one failure ends all.

``torchrun`` starts the processes and describes them in environment variables. Rank 0 alone draws progress bars, writes files and
decides; the others follow. A process that runs alone is rank 0 of one, for which every function here returns at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from undo_core.distributed.config import ParallelConfig
from undo_core.io.progress import console, send_updates_to

T = TypeVar("T")
FORMING = datetime.timedelta(minutes=2)  # while ranks that have all arrived connect, none waits longer for one that was killed
PATIENCE = datetime.timedelta(days=7)  # while rank 0 prepares data or writes a checkpoint, the other ranks wait
_LOST = "lost another rank, which was killed or cannot be reached; the same command continues"
LAST_WORDS = 5.0  # seconds in which rank 0 reports its error before the others end


class OtherRankFailed(RuntimeError):
    """Raised on the other ranks when rank 0 fails; rank 0 itself raises the error and reports it."""


@dataclass(frozen=True)
class Layout:
    """Groups of neighbouring ranks that share heads.

    Attributes:
        mesh: dimension ``tensor`` are the ranks of a group, which hold different parts; dimension ``data`` are the ranks that hold the
            same part.
        control: process group of this rank's group, on CPUs.
    """

    mesh: DeviceMesh
    control: dist.ProcessGroup


@dataclass(frozen=True)
class _Ranks:
    """This process among those of the run.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        control: process group for decisions, on CPUs.
        background: process group on CPUs for a thread that writes a checkpoint beside the training.
        store: key-value store that outlives a failed process; None if another made the default process group.
        layout: groups of ranks that share heads; None if every rank has whole ones.
    """

    rank: int
    count: int
    control: dist.ProcessGroup
    background: dist.ProcessGroup
    store: dist.Store | None
    layout: Layout | None = None


_ranks: _Ranks | None = None
_joined = False  # also while rank 0 decides as if it ran alone


def start() -> None:
    """Joins the processes that train one model; does nothing in a process that runs alone, or when called again.

    A default process group that the caller made is used as it is: its processes train one model together, and on which device is
    the caller's choice. Otherwise it is made from what ``torchrun`` says: each process takes the GPU of its number on the machine,
    with NCCL; without GPUs they communicate by gloo.

    Raises:
        ConnectionError: another rank did not come, or was lost.
    """
    global _joined, _ranks
    if _ranks is not None:
        return
    store = None
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with _others_expected():
            store, rank, size = next(dist.rendezvous("env://"))
            prefixed = dist.PrefixStore("undo", store)
            dist.init_process_group("nccl" if cuda else "gloo", store=prefixed, rank=rank, world_size=size)
    elif dist.get_world_size() == 1:
        return
    _joined = True
    with _others_expected():
        control, background = (_patient(dist.new_group(backend="gloo", timeout=FORMING)) for _ in range(2))
    _ranks = _Ranks(dist.get_rank(), dist.get_world_size(), control, background, store)
    if _ranks.rank:
        send_updates_to(lambda update: None)
        console.quiet = True


def arrange(config: ParallelConfig) -> None:
    """Divides the ranks into groups of ``config.tensor`` that share the heads of models sharded from now on; every rank calls it.

    Raises:
        ValueError: the number of ranks is not a multiple of ``config.tensor``; a process that runs alone is one rank.
    """
    global _ranks
    config.check(count())
    if _ranks is None or config.tensor == tensor():
        return
    layout = None
    if config.tensor > 1:
        from torch.distributed.device_mesh import init_device_mesh

        shape = (_ranks.count // config.tensor, config.tensor)
        cuda = torch.cuda.is_available() and dist.get_backend() != "gloo"
        mesh = init_device_mesh("cuda" if cuda else "cpu", shape, mesh_dim_names=("data", "tensor"))
        control, _ = dist.new_subgroups(config.tensor, backend="gloo", timeout=FORMING)
        layout = Layout(mesh, _patient(control))
    _ranks = dataclasses.replace(_ranks, layout=layout)


def _patient(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group that has formed, in which a rank waits for the others as long as :data:`PATIENCE`."""
    group.set_timeout(PATIENCE)
    return group


@contextlib.contextmanager
def _others_expected() -> Iterator[None]:
    """Turns the errors of a group that cannot form into a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        rank, size = os.environ.get("RANK", "?"), os.environ.get("WORLD_SIZE", "?")
        said = " ".join(str(error).split())[:200]
        raise ConnectionError(f"rank {rank} of {size} {_LOST} ({said})") from error


def stop() -> None:
    """Leaves the processes that :func:`start` joined; a default process group that the caller made stays."""
    global _joined, _ranks
    if _ranks is None:
        return
    if _ranks.store is None:
        dist.destroy_process_group(_ranks.control)
        dist.destroy_process_group(_ranks.background)
        if _ranks.layout is not None:
            dist.destroy_process_group(_ranks.layout.control)
    else:
        dist.destroy_process_group()
    _ranks, _joined = None, False


def check_joined() -> None:
    """Checks that the processes of a process group train one model together, and not a copy each without knowing of the others.

    Raises:
        ValueError: there is a process group of several processes that :func:`start` did not make.
    """
    if not _joined and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"torch.distributed: got a process group of {dist.get_world_size()} processes, in which each would train a copy of its own; "
            "wanted a call of undo_core.distributed.start() first, on every process"
        )


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _ranks is None else _ranks.rank


def count() -> int:
    """Number of processes; 1 for a process that runs alone."""
    return 1 if _ranks is None else _ranks.count


def layout() -> Layout | None:
    """The groups of ranks that share heads, as :func:`arrange` made them; None if every rank has whole heads."""
    return None if _ranks is None else _ranks.layout


def tensor() -> int:
    """Number of ranks that share a head; 1 if every rank has whole heads."""
    own = layout()
    return 1 if own is None else own.mesh["tensor"].size()


def control() -> dist.ProcessGroup | None:
    """Process group on CPUs that waits for days; None in a process that runs alone."""
    return None if _ranks is None else _ranks.control


def background() -> dist.ProcessGroup | None:
    """A second one, for one thread beside the main thread: collectives of two threads on one group could be mistaken for each other."""
    return None if _ranks is None else _ranks.background


def on_first(function: Callable[[], T]) -> T:
    """Calls ``function`` on rank 0, as in a process that runs alone, and returns its result on every rank; the others wait.

    Raises:
        OtherRankFailed: on the other ranks, if ``function`` raised an error on rank 0.
    """
    global _ranks
    if _ranks is None:
        return function()
    answer: list[Any] = [None, None]
    error: BaseException | None = None
    together = _ranks
    if together.rank == 0:
        try:
            _ranks = None
            answer = [True, function()]
        except BaseException as raised:
            answer, error = [False, None], raised
        finally:
            _ranks = together
    dist.broadcast_object_list(answer, src=0, group=together.control)
    if error is not None:
        raise error
    if not answer[0]:
        time.sleep(LAST_WORDS)
        raise OtherRankFailed("rank 0 failed")
    return answer[1]


def gather(value: T) -> list[T]:
    """Returns the values of all ranks on every rank, in their order."""
    if _ranks is None:
        return [value]
    found: list[Any] = [None] * _ranks.count
    dist.all_gather_object(found, value, group=_ranks.control)
    return found


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of the ranks' tensors of one shape, without a gradient; for a process that runs alone, the tensor itself."""
    if _ranks is None:
        return tensor
    summed = tensor.detach().clone()
    dist.all_reduce(summed)
    return summed


def share(size: int) -> tuple[int, int]:
    """Returns start and end of this rank's part of ``size`` things; the parts are contiguous and differ by at most one."""
    least, more = divmod(size, count())
    start = rank() * least + min(rank(), more)
    return start, start + least + (rank() < more)


def first_to_fail() -> bool:
    """Whether this rank is the first that reports a failure, so that one failure gives one message."""
    if _ranks is None or _ranks.store is None:
        return True
    with contextlib.suppress(RuntimeError):  # the store is gone if the process that held it was killed
        return _ranks.store.add("undo/failures", 1) == 1
    return True


def end(code: int) -> None:
    """Ends this process without waiting for the others, as nothing can be agreed any more; ``torchrun`` then ends them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def explained(error: BaseException) -> str:
    """Describes an error that ends the run on this rank: its own, or the loss of another rank."""
    own = f"rank {rank()} of {count()}"
    text = " ".join(str(error).split())
    if isinstance(error, dist.DistError) or "gloo" in text or "Connection closed by peer" in text:
        return f"{own} {_LOST} ({text[:200]})"
    return f"{own}: {type(error).__name__}: {text}"
