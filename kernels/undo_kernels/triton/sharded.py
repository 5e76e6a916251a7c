"""Exchange between the passes on a head that is sharded by vocabulary entries: partial sums of all processes become one part."""

from __future__ import annotations

import torch

from undo_kernels.triton.pair_math import CROSS_S, DIFFERENCE, ENERGY_T, L_S, L_T, M_S, M_T, TOP_S, TOP_T
from undo_kernels.vocabulary_shard import VocabularyShard, rescaled

_SUMS = {"m_s": M_S, "l_s": L_S, "m_t": M_T, "l_t": L_T, "difference": DIFFERENCE, "cross": CROSS_S, "energy": ENERGY_T}
_LOGITS = ("m_s", "m_t", "cross", "energy")  # in units of logits
_TOPS = {"top_s": TOP_S, "top_t": TOP_T}


def exchanged(
    shard: VocabularyShard,
    partial: torch.Tensor,
    witness: torch.Tensor,
    *,
    teacher: bool,
    cross: bool,
    statistics: bool,
    less_one: bool,
    differences: bool,
    unit: float,
    label: torch.Tensor | None,
    picked: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the partial sums of the whole vocabulary as one part, ``[FIELDS, tokens, 1]``, and the merged sums by name.

    Args:
        shard: the entries of this process.
        partial: ``[FIELDS, tokens, parts]``, this process's.
        witness: checksums of the student's hidden states of these tokens.
        teacher: whether there are the teacher's sums.
        cross: whether there are the sums for the gradient of reverse KL.
        statistics: whether there are those of the teacher's entropy and of the most likely entries.
        less_one: whether the sums of exponentials leave out the largest term, 1.
        differences: whether there are sums of differences; else they are formed from the others.
        unit: of the maxima and of the sums that logits enter as factors; see ``pair_math.py``.
        label: logits of the labels ``[tokens]``, NaN where another process holds them, or None.
        picked: logits at the known entries ``[tokens, k]``, 0 where another process holds them, or None.
    """
    names = ["m_s", "l_s"] + ["m_t", "l_t", "difference"] * teacher + ["cross"] * cross + ["energy"] * statistics
    sums = {name: partial[_SUMS[name].value].double() * (unit if name in _LOGITS else 1.0) for name in names}
    if less_one:
        sums |= {name: sums[name] + 1.0 for name in ("l_s", "l_t") if name in sums}
    if teacher and not differences:
        sums["difference"] = sums["l_s"] - sums["l_t"]
    maxima = {name: sums[name].amax(-1) for name in ("m_s", "m_t") if name in sums}
    whole = rescaled(sums, torch.stack(list(maxima.values()))[..., None])
    own = maxima | {name: values.sum(-1) for name, values in whole.items()}
    if statistics:
        for name, most in (("top_s", "m_s"), ("top_t", "m_t")):
            first = (sums[most] == own[most][:, None]).int().argmax(-1, keepdim=True)
            own[name] = partial[_TOPS[name].value].gather(-1, first)[:, 0]
    if label is not None:
        own["label"] = label
    if picked is not None:
        own["picked"] = picked
    merged = shard.merged(own, witness)
    found = torch.zeros_like(partial[:, :, :1])
    for name, field in (_SUMS | _TOPS).items():
        if name in merged:
            values = merged[name] - 1.0 if less_one and name in ("l_s", "l_t") else merged[name]
            found[field.value, :, 0] = values / unit if name in _LOGITS else values
    return found, merged
