"""Arguments of a loss whose head is sharded by vocabulary entries, brought to this process's part of them.

The weight is a ``DTensor`` with placement ``Shard(0)`` on a mesh of one dimension; uneven and empty shards are allowed. Everything else
is the same on all processes of the mesh: a plain tensor, or a ``DTensor`` with placement ``Replicate()``.
"""

from __future__ import annotations

from typing import Any

import torch

from undo_kernels.ops import checks
from undo_kernels.vocabulary_shard import VocabularyShard

_WANTED = "a DTensor with placement Shard(0), by vocabulary entries, on a mesh of one dimension"


def local_head(
    prefix: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, vocab_size: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int | None, VocabularyShard | None]:
    """Returns hidden states, weight, bias and ``vocab_size`` of the entries on this process, and where they lie.

    Plain tensors are returned as they are, with None. Autograd gives the gradients of weight and bias the placement that they have.

    Raises:
        ValueError: another placement or mesh, a bias that is sharded otherwise, or hidden states that are not replicated.
    """
    if not checks.is_dtensor(weight):
        for name, tensor in (("bias", bias), ("hidden", hidden)):
            if checks.is_dtensor(tensor):
                checks.fail(
                    f"{prefix}{name}",
                    f"a DTensor with a plain {prefix}weight",
                    f"a plain tensor, or {prefix}weight as {_WANTED}",
                )
        return hidden, weight, bias, vocab_size, None
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    if mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        got = f"a DTensor with placements {tuple(weight.placements)} on a mesh of {mesh.ndim} dimensions"
        checks.fail(f"{prefix}weight", got, f"{_WANTED} (or a plain tensor)")
    if mesh.get_coordinate() is None:
        checks.fail(f"{prefix}weight", "a mesh without this process", "a call on the processes of the mesh alone")
    if bias is not None and not (
        checks.is_dtensor(bias) and bias.device_mesh == mesh and tuple(bias.placements) == (Shard(0),)
    ):
        got = f"placements {tuple(bias.placements)}" if checks.is_dtensor(bias) else "a plain tensor"
        checks.fail(f"{prefix}bias", got, f"a DTensor sharded like {prefix}weight")
    if checks.is_dtensor(hidden) and hidden.device_mesh != mesh:
        checks.fail(f"{prefix}hidden", f"a DTensor on {hidden.device_mesh}", f"the mesh of {prefix}weight, {mesh}")
    hidden = checks.replicated(f"{prefix}hidden", hidden)
    ranks, rank, rows = mesh.size(), mesh.get_local_rank(), weight.shape[0]
    entries = rows if vocab_size is None else vocab_size
    size = -(-rows // ranks)  # Shard cuts like torch.chunk
    first = min(rank * size, rows)
    held = min(max(entries - first, 0), min(size, rows - first))
    shard = VocabularyShard.of(mesh.get_group(), first, entries, min(size, entries))
    local = [None if t is None else t.to_local(grad_placements=[Shard(0)]) for t in (weight, bias)]
    if local[0].shape[0] != min(size, rows - first):
        checks.fail(
            f"{prefix}weight",
            f"a local shard of {local[0].shape[0]} rows",
            f"{min(size, rows - first)}, as Shard(0) cuts {rows}",
        )
    return hidden, local[0], local[1], held, shard


def check_same_cut(student: Any, teacher: Any, student_rows: int, teacher_rows: int) -> None:
    """Checks that both heads are whole, or that both are cut into the same vocabulary entries on the same processes."""
    wanted = "the student's: both heads whole, or both sharded over the same mesh and at the same vocabulary entries"
    if (student is None) != (teacher is None):
        checks.fail("teacher_weight", "a whole head" if teacher is None else "a sharded head", wanted)
    if student is None:
        return
    if student.group != teacher.group:
        checks.fail("teacher_weight", f"a head sharded over process group {teacher.group}", f"{student.group}, {wanted}")
    if student.widest != teacher.widest:  # equal on all processes, so that none of them waits for the others
        got = f"{teacher_rows} rows, {teacher.widest} on a process"
        checks.fail("teacher_weight", got, f"{student_rows} rows, {student.widest} on a process like {wanted}")
