"""On-policy distillation in TRL's DistillationTrainer, the successor of GKD, with the fused divergence in place of its own.

In each step the student writes completions of the prompts, and learns the teacher's distributions on what it wrote. TRL generates
and masks as before; only the loss changes.
"""

import sys
import tempfile

import tiny
import torch
from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer

from undo_core import ops
from undo_core.distributed import in_forward
from undo_core.models import head_of, hidden_states

WORKSPACE = (
    128 << 20
)  # bytes of logits held at a time; without this bound the loss is faster at large vocabularies, and holds more


class FusedDistillationTrainer(DistillationTrainer):
    """DistillationTrainer that computes the divergence from hidden states and heads, accurate where both nearly agree."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self.accelerator.unwrap_model(self.teacher_model)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        predicting = slice(inputs["prompt_ids"].shape[1] - 1, -1)  # position t predicts token t + 1
        with torch.no_grad():
            target = hidden_states(teacher.eval(), ids, mask)[:, predicting]
        if self.model.training:  # of all accumulated batches, as the student wrote them
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        counted = inputs["completion_mask"].bool() & inputs.get("tool_mask", inputs["completion_mask"]).bool()

        def divergence(student):
            head, teacher_head = head_of(student), head_of(teacher)
            return ops.linear_kl_div(
                hidden_states(student, ids, mask)[:, predicting],
                head.weight,
                target,
                teacher_head.weight,
                mask=counted,
                divergence={0.0: "forward", 1.0: "reverse"}.get(self.beta, "jsd"),  # TRL's beta is the teacher's share, as here
                beta=self.beta if 0 < self.beta < 1 else 0.5,
                temperature=self.temperature,
                workspace_bytes=WORKSPACE,
                normalizer=num_items_in_batch,
                **head.options("student_"),
                **teacher_head.options("teacher_"),
            )

        loss = in_forward(model, divergence)
        return (loss, None) if return_outputs else loss


def prompts(count: int) -> Dataset:
    """The first words of sentences; the student writes the rest."""
    return Dataset.from_dict({"prompt": [" ".join(text.split()[:4]) for text in tiny.texts(count)]})


def settings(output: str, **options) -> DistillationConfig:
    options = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 1, **options}
    return DistillationConfig(
        output,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        max_completion_length=8,
        **options,
    )


def main(output: str, trainer: type[DistillationTrainer] = FusedDistillationTrainer, **options) -> list[float]:
    run = trainer(
        tiny.model(seed=0),
        tiny.model(seed=1),
        args=settings(output, **options),
        train_dataset=prompts(64),
        processing_class=tiny.tokenizer(),
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print(f"divergence per token: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
