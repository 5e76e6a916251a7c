"""UNDO on a checkpoint of your own: unlearn, noise, distill, attack.

    python examples/checkpoint.py CHECKPOINT OUTPUT --retain keep.txt --forget forget.txt

CHECKPOINT is a Hugging Face folder; a line of a text file is a document. The settings are for a small model: see what `undo
plan` says about yours. `undo run configs/hf-template.yaml` does the same with controls, checkpoints, resuming and a report.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from undo_core import AttackConfig, TrainConfig, UnlearnConfig, distill, noise_, relearn, unlearn


def batches(path: str, tokenizer, rows: int = 8, length: int = 256) -> list[dict[str, torch.Tensor]]:
    """The documents of a file, padded, a few at a time. The padding is known by the attention mask."""
    texts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    options = {
        "return_tensors": "pt",
        "padding": True,
        "truncation": True,
        "max_length": length,
        "return_token_type_ids": False,
    }
    return [dict(tokenizer(texts[start : start + rows], **options)) for start in range(0, len(texts), rows)]


@torch.no_grad()
def loss_of(model, held_out: list[dict[str, torch.Tensor]]) -> float:
    """Cross-entropy per token, as transformers computes it."""
    losses = [
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss for batch in held_out
    ]
    return torch.stack(losses).mean().item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--retain", required=True)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--alpha", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=1000, help="of the distillation")
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    original = AutoModelForCausalLM.from_pretrained(options.checkpoint)
    retain, forget = batches(options.retain, tokenizer), batches(options.forget, tokenizer)
    held_out = forget.pop() if len(forget) > 1 else forget[0]

    teacher = copy.deepcopy(original)
    unlearn(
        teacher, forget=forget, retain=retain, config=UnlearnConfig(train=TrainConfig(steps=min(60, options.steps), lr=2e-4))
    )
    student = copy.deepcopy(teacher)
    noise_(student, alpha=options.alpha, beta=0.1, seed=0)
    distill(student, teacher, retain + forget, TrainConfig(steps=options.steps, lr=7e-4, schedule="cosine"))
    student.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)

    steps = [0, min(20, options.steps), min(100, options.steps)]
    attack = AttackConfig(rates=[1e-4, 5e-4], evaluate_at=sorted(set(steps)), headline_step=max(steps), extend=0)
    result = {"original": loss_of(original, [held_out])}
    for name, model in (("unlearn only", teacher), ("UNDO", student)):
        curves = relearn(model, forget, attack, evaluate=lambda m: {"forget": loss_of(m, [held_out])}, higher_is_better=False)
        result[name] = min(curve.history[-1]["forget"] for curve in curves.values())
    for name, value in result.items():
        print(
            f"{name}: cross-entropy {value:.3f} per token of held-out forget "
            f"text{'' if name == 'original' else ' after the attack'}"
        )
    return result


if __name__ == "__main__":
    main()
