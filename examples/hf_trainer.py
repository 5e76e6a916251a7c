"""Distillation in Hugging Face's Trainer: a subclass that computes another loss. All else of the Trainer works as before."""

import sys
import tempfile

import tiny
import torch
from transformers import Trainer, TrainingArguments

from undo_core import ops
from undo_core.distributed import in_forward
from undo_core.models import head_of, hidden_states


class DistillationTrainer(Trainer):
    """Trains ``model`` to match ``teacher`` on every token that has a label."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        with torch.no_grad():
            target = hidden_states(self.teacher, ids, mask)[:, :-1]
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # DDP takes the mean over processes

        def divergence(student):
            head, teacher_head = head_of(student), head_of(self.teacher)
            return ops.linear_kl_div(
                hidden_states(student, ids, mask)[:, :-1],
                head.weight,
                target,
                teacher_head.weight,
                mask=inputs["labels"][:, 1:] != -100,
                normalizer=num_items_in_batch,  # the tokens of all accumulated batches: accumulation does not change the gradient
                **head.options("student_"),
                **teacher_head.options("teacher_"),
            )

        loss = in_forward(model, divergence)
        return (loss, {}) if return_outputs else loss


def rows(count: int) -> list[dict[str, list[int]]]:
    """Sequences of one length, which the default collator can stack."""
    made = tiny.tokenizer()(tiny.texts(count), padding="max_length", max_length=14, return_token_type_ids=False)
    labels = [[token if text else -100 for token, text in zip(*pair, strict=True)] for pair in zip(*made.values(), strict=True)]
    columns = {**made, "labels": labels}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def main(output: str, **options) -> list[float]:
    settings = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 1, **options}
    arguments = TrainingArguments(output, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **settings)
    trainer = DistillationTrainer(tiny.model(seed=0), arguments, train_dataset=rows(64), teacher=tiny.model(seed=1))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"KL per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
