"""Counts the weights that an attack in bfloat16 changes, by learning rate, with rounding to nearest (as published) and
stochastic.

    python bench/study_bfloat16_attack.py

The demo's model at its initialisation (0.45 M parameters, normal with standard deviation 0.02), 20 steps on compact
multiplication and division, 15 sequences each. Prints the share of weights that differ from where they began, and the median
change over the rate.
"""

from __future__ import annotations

import copy

import torch

from undo_core.attacks import AttackConfig
from undo_core.attacks.relearning import attack
from undo_core.data.arithmetic import compact_splits
from undo_core.models import build_model

RATES = (1e-6, 4e-6, 1e-5, 2e-5, 5e-5, 1e-4, 1e-3)
PRECISIONS = ("bfloat16", "bfloat16-stochastic", "float32")
SHAPE = {
    "model_type": "gemma2",
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position_embeddings": 64,
    "sliding_window": 64,
}


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    tokenizer, splits = compact_splits(0, 2000, 10)
    start = build_model(SHAPE, tokenizer, 0).bfloat16()
    print("| rate | " + " | ".join(f"{name}: moved | median" for name in PRECISIONS) + " |")
    print("| ---: |" + " ---: | ---: |" * len(PRECISIONS))
    for rate in RATES:
        cells = []
        for precision in PRECISIONS:
            model = copy.deepcopy(start).to(torch.float32 if precision == "float32" else torch.bfloat16)
            config = AttackConfig(evaluate_at=[0, 20], headline_step=20, batch_size=15, precision=precision)
            attack(model, splits["train_forget"], rate, config, evaluate=lambda model: {}, progress=False)
            pairs = [(a.float(), b.float()) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
            change = torch.cat([(a - b).detach().abs().flatten() for a, b in pairs if a.ndim == 2])
            cells += [f"{(change > 0).float().mean():.1%}", f"{change.median() / rate:.1f}"]
        print(f"| {rate:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
