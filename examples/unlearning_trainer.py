"""Unlearning in Hugging Face's Trainer: each batch has a forget and a retain part, and the loss is that of a method of undo-core.

This is the shape of the trainers of OpenUnlearning, so that a method moves there with its two parts: `METHODS[name](model, config)`
and its `loss`.
"""

import sys
import tempfile

import tiny
import torch
from transformers import Trainer, TrainingArguments

from undo_core import UnlearnConfig
from undo_core.distributed import in_forward
from undo_core.models import evaluating
from undo_core.training import Batch
from undo_core.unlearning import RMUConfig
from undo_core.unlearning.method import METHODS

CONFIGS = {
    "maxent": UnlearnConfig(method="maxent"),
    "graddiff": UnlearnConfig(method="graddiff", retain_weight=5.0),
    "npo": UnlearnConfig(method="npo"),
    "rmu": UnlearnConfig(method="rmu", rmu=RMUConfig(first_layer=0, target_layer=1, coefficient=2.0)),
}


class UnlearningTrainer(Trainer):
    """Trains with the loss of an unlearning method; the losses over the vocabulary hold no logits."""

    def __init__(self, *args, unlearn: UnlearnConfig, **kwargs):
        super().__init__(*args, **kwargs)
        self.method = METHODS[unlearn.method](self.model, unlearn)  # now, as the model is still the original one
        if self.method.reference is not None:  # NPO compares with the original model: with numbers, not with a second model
            with torch.no_grad(), evaluating(self.model):
                for row in self.train_dataset:
                    batch = batch_of(self._prepare_inputs(collate([row]))["forget"])
                    row["forget"]["reference"] = self.method.reference(self.model, batch)[0].cpu()

    def train(self, *args, **kwargs):
        with self.method.alone(self.model):  # RMU trains some matrices and freezes the rest
            return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batches = {name: batch_of(columns) for name, columns in inputs.items()}
        counted = {name: batch.counted for name, batch in batches.items()}
        loss = in_forward(model, lambda inner: self.method.loss(inner, batches, counted))
        return (loss, {}) if return_outputs else loss


def batch_of(columns: dict[str, torch.Tensor]) -> Batch:
    return Batch(columns["input_ids"], columns["labels"] != -100, columns["attention_mask"], reference=columns.get("reference"))


def collate(rows: list[dict[str, dict[str, torch.Tensor]]]) -> dict[str, dict[str, torch.Tensor]]:
    return {part: {name: torch.stack([row[part][name] for row in rows]) for name in rows[0][part]} for part in rows[0]}


def rows(count: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    """Pairs of a forget and a retain sentence."""
    forget, retain = (tiny.batch(seed, count) for seed in (0, 1))
    return [
        {"forget": {k: v[i] for k, v in forget.items()}, "retain": {k: v[i] for k, v in retain.items()}} for i in range(count)
    ]


def main(output: str, method: str = "maxent", **options) -> tuple[dict[str, float], list[float]]:
    """Unlearns; returns by how much the cross-entropy of the forget and the retain text rose, and the loss of each step."""
    model, data = tiny.model(), rows(32)
    whole = collate(data)

    def nll() -> dict[str, float]:
        with torch.no_grad():
            return {part: model(**whole[part]).loss.item() for part in ("forget", "retain")}

    before = nll()
    options = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 8, "logging_steps": 1, **options}
    arguments = TrainingArguments(
        output, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, **options
    )
    trainer = UnlearningTrainer(model, arguments, train_dataset=data, data_collator=collate, unlearn=CONFIGS[method])
    trainer.train()
    after = nll()
    for part in before:
        print(f"{method}, {part}: cross-entropy {before[part]:.3f} before, {after[part]:.3f} after")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {part: after[part] - before[part] for part in before}, losses


if __name__ == "__main__":
    for name in CONFIGS if len(sys.argv) < 2 else sys.argv[1:]:
        main(tempfile.mkdtemp(), name)
