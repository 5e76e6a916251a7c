"""Checks every causal class: losses of hidden states and head, and their gradients, equal those of the model's own logits."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from causal_models import MODELS, NOT_TINY, build, config_of, fields_of, names
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from undo_core import ops
from undo_core.models import UnsupportedHead, head_of, hidden_states

# Constants of heads, none neutral; a model gets those in its configuration.
CONSTANTS = {
    "final_logit_softcapping": 2.0,
    "lm_head_bias": True,
    "lm_head_multiplier": 0.7,
    "logit_scale": 0.3,
    "logits_mup_width_multiplier": 3.0,
    "logits_scaling": 4.0,
    "logits_soft_cap": 2.0,
    "output_logit_soft_cap": 2.0,
    "unpadded_vocab_size": 60,
}
# These do not run in float64, because their code names float32. Their oracle is in float64 from the logits on.
SINGLE = ("inkling2_loop_text", "inkling2_text", "xglm")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def model_types(first: str, last: str) -> list[str]:
    """Returns the model types whose names begin with ``first`` to ``last``; each range has a test file."""
    return [name for name in names() if first <= name[0] <= last]


def check(name: str) -> None:
    """Asserts that the losses of a model type are right, or that ``docs/models.md`` names it with the same reason."""
    found = outcome(name)
    page = PAGE.read_text(encoding="utf-8")
    if f"of transformers {transformers.__version__} " in page:  # the page describes one version; the losses are right in any
        assert (None if found == "equal" else _cell(found.partition(": ")[2])) == _stated(page).get(name)


def check_page() -> None:
    """Asserts that the counts in ``docs/models.md`` agree with its tables and the installed transformers."""
    page = PAGE.read_text(encoding="utf-8")
    stated, left = set(_stated(page)), NOT_TINY.keys()
    total, version = re.search(r"\| (\d+) model types of transformers (\S+) \|", page).groups()
    if version == transformers.__version__:
        assert stated <= set(names()) and int(total) == len(names())
    counts = [int(n) for n in re.findall(r"^\| [a-z ]+ \| (\d+) \|$", page, re.MULTILINE)]
    assert counts == [int(total) - len(stated), len(stated - left), len(stated & left)]


def _stated(page: str) -> dict[str, str]:
    """Returns the reasons in the page's tables, by model type."""
    return dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", page, re.MULTILINE))


def outcome(name: str) -> str:
    """Returns ``equal``, or why the model type is refused or omitted.

    Raises:
        AssertionError: a loss or a gradient differs by more than rounding.
    """
    if name in NOT_TINY:
        return f"not tiny: {NOT_TINY[name]}"
    torch.manual_seed(0)
    config = config_of(name).get_text_config()
    model = build(
        name, **{k: v for k, v in CONSTANTS.items() if k in fields_of(type(config)) and k not in MODELS.get(name, {})}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)  # no bias is 0, no norm is neutral
        if (output := model.get_output_embeddings()) is not None:
            output.weight.add_(torch.randn_like(output.weight), alpha=0.2)
    model.train(name == "reformer")  # it has gradients only in training mode; the settings have no dropout
    try:
        head = head_of(model)
    except UnsupportedHead as error:
        return f"refused: {error}"
    ids = torch.randint(3, 60, (2, 8))
    labels, teacher = ids.roll(-1, 1), torch.randn(2, 8, len(head.weight))
    labels[:, -1] = -100
    exact = _values(model if name in SINGLE else _double(model), ids, labels, teacher.double(), _by_torch)
    torchs = _values(model, ids, labels, teacher, _by_torch)
    ours = _values(model, ids, labels, teacher, _by_ops)
    for what, theirs, own, right in zip(("cross-entropy", "KL", "gradients"), torchs, ours, exact, strict=True):
        size = right.norm()
        assert bool(size > 0), f"{name}: {what} is 0"
        error, bound = float((own.double() - right).norm() / size), float((theirs.double() - right).norm() / size)
        assert error <= 3 * bound + 16 * 2.0**-24, f"{name}: {what} is off by {error:.2g}, by torch {bound:.2g}"
    return "equal"


def _double(model: nn.Module) -> nn.Module:
    double = copy.deepcopy(model).double()
    double.set_experts_implementation("eager")  # the grouped products have no float64
    return double


def _values(
    model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor, losses: Any
) -> list[torch.Tensor]:
    model.zero_grad(set_to_none=True)
    found = losses(model, ids, labels, teacher)
    sum(found).backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.is_floating_point()]
    return [*(loss.detach() for loss in found), torch.cat([g.double().flatten() for g in gradients])]


def _by_torch(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = model(input_ids=ids, use_cache=False).logits
    logits = logits.to(teacher.dtype)
    flat, wanted = logits.flatten(0, 1), log_softmax(teacher.flatten(0, 1), -1)
    return cross_entropy(flat, labels.flatten()), kl_div(log_softmax(flat, -1), wanted, log_target=True, reduction="batchmean")


def _by_ops(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, ...]:
    head, hidden = head_of(model), hidden_states(model, ids)
    eye = torch.eye(teacher.shape[-1])  # a teacher whose hidden states are its logits
    return (
        ops.linear_cross_entropy(hidden, head.weight, labels, **head.options()),
        ops.linear_kl_div(hidden, head.weight, teacher, eye, **head.options("student_")),
    )


def table() -> str:
    """Returns the tables of ``docs/models.md``: how many model types are equal, and which are not, with the reasons."""
    found = {name: outcome(name) for name in names()}
    refused = {name: text.removeprefix("refused: ") for name, text in found.items() if text.startswith("refused")}
    left = {name: text.removeprefix("not tiny: ") for name, text in found.items() if text.startswith("not tiny")}
    lines = [
        f"| {len(found)} model types of transformers {transformers.__version__} | |",
        "|---|---|",
        f"| equal to transformers | {len(found) - len(refused) - len(left)} |",
    ]
    lines += [f"| refused by name | {len(refused)} |", f"| cannot be built at a tiny size | {len(left)} |", ""]
    for title, kind in (("Refused", refused), ("Cannot be built at a tiny size", left)):
        lines += [f"| {title} | Reason |", "|---|---|", *(f"| `{name}` | {_cell(text)} |" for name, text in kind.items()), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    print(table())
