"""Distillation in TRL's SFTTrainer, by overriding compute_loss. TRL tokenizes, packs, pads and masks; only the loss changes."""

import sys
import tempfile

import tiny
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from undo_core import ops
from undo_core.models import head_of, hidden_states


class DistillationSFTTrainer(SFTTrainer):
    """Trains ``model`` to match ``teacher`` on every token that has a label."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        with torch.no_grad():
            target = hidden_states(self.teacher, ids, mask)[:, :-1]
        head, teacher_head = head_of(student), head_of(self.teacher)
        loss = ops.linear_kl_div(
            hidden_states(student, ids, mask)[:, :-1],
            head.weight,
            target,
            teacher_head.weight,
            mask=inputs["labels"][:, 1:] != -100,
            normalizer=num_items_in_batch,
            **head.options("student_"),
            **teacher_head.options("teacher_"),
        )
        return (loss, {}) if return_outputs else loss


def main(output: str, **options) -> list[float]:
    settings = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 1, **options}
    arguments = SFTConfig(
        output, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, max_length=16, **settings
    )
    trainer = DistillationSFTTrainer(
        tiny.model(seed=0),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": tiny.texts(64)}),
        processing_class=tiny.tokenizer(),
        teacher=tiny.model(seed=1),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"KL per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
