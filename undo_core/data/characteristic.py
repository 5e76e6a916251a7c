"""Which tokens are characteristic of the forget text, and which retain sequences are near to it.

The score of a token v is the logarithm of its odds ratio between the two texts, with a Dirichlet prior that keeps rare tokens from
having large ratios by chance (Monroe, Colaresi and Quinn 2008, "Fightin' Words", Political Analysis 16(4), equation 15):

``delta_v = log((f_v + a) / (F + V a - f_v - a)) - log((r_v + a) / (R + V a - r_v - a))``

with ``f_v`` and ``r_v`` the counts of v in forget and retain text, ``F`` and ``R`` their totals, ``V`` the number of vocabulary
entries and ``a = 0.5`` the prior's count of every token. Their z-score divides delta by its standard deviation; it ranks a frequent
token that is a little more frequent in one text above a token that only this text has, and is therefore not used here.
"""

from __future__ import annotations

import torch

from undo_core.data.sequences import Sequences

PRIOR = 0.5
ROWS = 4096  # sequences that are held in float64 at a time


def characteristic(forget: Sequences, retain: Sequences, vocabulary: int) -> torch.Tensor:
    """Returns the score of every token, ``[vocabulary]`` float64; -inf for tokens that the forget text does not have."""
    counted = _counts(forget, vocabulary)
    return _log_odds(counted, _counts(retain, vocabulary)).masked_fill(counted == 0, -torch.inf)


def nearest(retain: Sequences, forget: Sequences, share: float) -> torch.Tensor:
    """Returns the indices, in ascending order, of the share of retain sequences that resemble the forget text most.

    The resemblance is the mean of ``delta_v`` over a sequence's tokens. Equal sequences are taken together or in order.

    Args:
        retain: sequences to choose from.
        forget: text of the forgotten capability.
        share: in (0, 1]; at least one sequence is taken.
    """
    vocabulary = 1 + max(retain.largest_id(), forget.largest_id())
    ratio = _log_odds(_counts(forget, vocabulary), _counts(retain, vocabulary))
    blocks = torch.arange(len(retain)).split(ROWS)
    scores = torch.cat([(ratio[retain.input_ids[rows].long()] * retain.text_mask(rows)).sum(1) for rows in blocks])
    scores /= retain.lengths.clamp_min(1)
    count = max(1, round(share * len(retain)))
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _counts(sequences: Sequences, vocabulary: int) -> torch.Tensor:
    total = torch.zeros(vocabulary, dtype=torch.float64)
    for rows in torch.arange(len(sequences)).split(ROWS):
        total += torch.bincount(sequences.input_ids[rows][sequences.text_mask(rows)].long(), minlength=vocabulary)
    return total


def _log_odds(forget: torch.Tensor, retain: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of every token's odds ratio."""

    def odds(counts: torch.Tensor) -> torch.Tensor:
        smoothed = counts + PRIOR
        return (smoothed / (smoothed.sum() - smoothed)).log()

    return odds(forget) - odds(retain)
