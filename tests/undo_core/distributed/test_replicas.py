"""Losses of one's own on a model that DDP replicates: ``in_forward``."""

import pytest
import torch
from gloo_processes import forked
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from undo_core import ops
from undo_core.distributed import in_forward
from undo_core.models import head_of, hidden_states

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
IDS = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(1))


def model_of():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **SIZES))


def loss_of(model, ids):
    head = head_of(model)
    return ops.linear_cross_entropy(hidden_states(model, ids)[:, :-1], head.weight, ids[:, 1:], **head.options())


def gradients(model):
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def wanted():
    """The gradients of the whole batch, as transformers computes them."""
    model = model_of().double()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return gradients(model)


def work(mesh):
    inner, exact = model_of(), wanted()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    own = inner.forward = inner.forward  # as accelerate's autocast
    rows = IDS[2 * mesh.get_rank() :][:2]
    for _ in range(2):
        model.zero_grad()
        in_forward(model, lambda found: loss_of(found, rows)).backward()
        assert vars(inner)["forward"] is own
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(ZeroDivisionError):
        in_forward(model, lambda found: 1 / 0)
    assert vars(inner)["forward"] is own


def test_every_process_has_the_gradients_of_the_whole_batch():
    assert not forked(2, work)


def test_a_model_alone_is_handed_on_and_other_wrappers_are_refused():
    model = model_of()
    in_forward(model, lambda found: loss_of(found, IDS)).backward()
    for name, exact in wanted().items():
        torch.testing.assert_close(gradients(model)[name].double(), exact, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"^model: got a DataParallel around a model, wanted a model, or Distributed"):
        in_forward(torch.nn.DataParallel(model), lambda found: loss_of(found, IDS))
