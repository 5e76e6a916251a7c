"""TRL's SFTTrainer with the fused cross-entropy, by overriding compute_loss. TRL tokenizes, packs, pads and masks as before."""

import sys
import tempfile

import tiny
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from undo_core import ops
from undo_core.distributed import in_forward
from undo_core.models import head_of, hidden_states

WORKSPACE = (
    128 << 20
)  # bytes of logits held at a time; without this bound the loss is faster at large vocabularies, and holds more


class FusedSFTTrainer(SFTTrainer):
    """SFTTrainer that never holds ``[tokens, vocabulary]`` logits. Its loss is cross-entropy; TRL's other losses are refused."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll" or self.args.label_smoothing_factor:
            asked = f"{self.args.loss_type!r} with label smoothing {self.args.label_smoothing_factor}"
            raise ValueError(f"loss_type: got {asked}, wanted 'nll' with 0: the fused loss is the cross-entropy of the labels")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes  # DDP takes the mean over processes

        def cross_entropy(model):
            columns = (inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))  # the last when packed
            head = head_of(model)
            return ops.linear_cross_entropy(
                hidden_states(model, *columns)[:, :-1],
                head.weight,
                inputs["labels"][:, 1:],
                workspace_bytes=WORKSPACE,
                normalizer=num_items_in_batch,  # the tokens of all accumulated batches: accumulation does not change the gradient
                **head.options(),
            )

        loss = in_forward(model, cross_entropy)
        return (loss, {}) if return_outputs else loss


def settings(output: str, **options) -> SFTConfig:
    options = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "num_train_epochs": 3, "logging_steps": 1, **options}
    return SFTConfig(
        output, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, max_length=16, **options
    )


def main(output: str, trainer: type[SFTTrainer] = FusedSFTTrainer, **options) -> list[float]:
    run = trainer(
        tiny.model(seed=0),
        args=settings(output, **options),
        train_dataset=Dataset.from_dict({"text": tiny.texts(64)}),
        processing_class=tiny.tokenizer(),
    )
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    print(f"cross-entropy: {losses[0]:.4f} before, {losses[-1]:.4f} after")
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
