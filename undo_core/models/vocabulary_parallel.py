"""Shares the vocabulary head of a model among processes, each of which holds a part of the vocabulary's entries."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from undo_core.models.adapters import bare
from undo_core.models.heads import head_of


def parallelize_head(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Shards the output layer of ``model`` by vocabulary entries over the processes of ``mesh``, in place.

    Weight and bias become ``DTensor`` parameters with placement ``Shard(0)``, so that a process holds ``V / ranks`` entries of the
    head, of its gradient and of its optimizer states. The losses of :mod:`undo_core.ops` take them as they are: each process computes
    its part of the vocabulary, and nothing of the vocabulary's size is exchanged. The rest of the model stays whole. With tied
    weights the embedding is the same parameter, sharded too: a process looks up the tokens that it holds, and the results are
    summed. The model's own forward pass still returns whole logits.

    All processes of the mesh must hold the same model and pass the same batches. It combines with FSDP2 over another mesh dimension::

        mesh = init_device_mesh("cuda", (4, 2), mesh_dim_names=("data", "tensor"))
        parallelize_head(model, mesh["tensor"])
        fully_shard(model, mesh=mesh["data"])

    Args:
        model: a causal language model of transformers, on the devices of the mesh or on the meta device; a head on the meta device
            is not compared with the model's own logits.
        mesh: a mesh of one dimension.

    Returns:
        ``model``.

    Raises:
        ValueError: a mesh of several dimensions or another kind of device, or a model whose output layer is sharded already, has an
            adapter, computes more logits than the model returns, or is tied to something else than an embedding.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: got a mesh of {mesh.ndim} dimensions, wanted one dimension, such as mesh['tensor']")
    output, embedding = check_divisible(model)
    if output.weight.device.type not in (mesh.device_type, "meta"):
        raise ValueError(f"mesh: got a mesh of {mesh.device_type} devices for a model on {output.weight.device}")
    if embedding is not None:
        parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()))
    parallelize_module(output, mesh, ColwiseParallel(output_layouts=Replicate()))
    if embedding is not None:
        output.weight = embedding.weight
    bare(model)._undo_head_mesh = mesh  # tells a head that is shared from one that FSDP has not gathered
    return model


def has_same_tokens(model: PreTrainedModel) -> bool:
    """Whether the ranks that share the head of ``model`` must run it for the same tokens, as :func:`parallelize_head` says."""
    return hasattr(bare(model), "_undo_head_mesh") and not hasattr(bare(model), "_undo_sharing")


def check_divisible(model: PreTrainedModel) -> tuple[nn.Linear, nn.Embedding | None]:
    """Checks that the head of a whole ``model`` can be divided; returns it, and the embedding tied to it, if any.

    Raises:
        ValueError: as :func:`parallelize_head`.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(getattr(output, "weight", None), DTensor):
        raise ValueError("model: got an output layer that is sharded already, wanted a whole one")
    if not isinstance(output, nn.Linear):
        raise ValueError(
            f"model: got an output layer that is a {type(output).__name__}, wanted a Linear layer; merge adapters before (merge_and_unload)"
        )
    head = head_of(model)  # measures the head while it is whole
    if len(head.weight) != len(output.weight):
        raise ValueError(
            f"model: got an output layer of {len(output.weight)} entries, of which the model returns {len(head.weight)} logits; "
            "wanted a layer without further entries"
        )
    if embedding.weight is not output.weight:
        return output, None
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"model: got weights tied to a {type(embedding).__name__}, wanted an Embedding")
    return output, embedding
