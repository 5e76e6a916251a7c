"""A fused loss in a training loop of your own: the student learns the teacher's distributions, and no logits are ever held."""

import tiny
import torch

from undo_core import ops
from undo_core.models import head_of, hidden_states


def distillation_loss(student, teacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Forward KL(teacher || student), the mean over the tokens that have a label."""
    inputs = (batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        target = hidden_states(teacher, *inputs)[:, :-1]
    hidden = hidden_states(student, *inputs)[:, :-1]  # position t predicts token t + 1
    head, teacher_head = head_of(student), head_of(teacher)  # weight, bias, scale and softcap
    return ops.linear_kl_div(
        hidden,
        head.weight,
        target,
        teacher_head.weight,
        mask=batch["labels"][:, 1:] != -100,
        **head.options("student_"),
        **teacher_head.options("teacher_"),
    )


def main(steps: int = 20) -> list[float]:
    student, teacher = tiny.model(seed=0), tiny.model(seed=1).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        loss = distillation_loss(student, teacher, tiny.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"KL per token: {losses[0]:.4f} before, {losses[-1]:.4f} after {steps} steps")
    return losses


if __name__ == "__main__":
    main()
