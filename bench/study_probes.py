"""Measures attacks without training on a small unlearned model: solved examples before the prompt, and rounded weights.

    python bench/study_probes.py

The models are a one-layer model that knows the products and sums of two digits below five, and the same model after MaxEnt
unlearning of the products. Prints the accuracy on products and sums, all of which were trained on. ``packed`` is a model
pretrained on sequences of three problems each; ``single`` was pretrained on one problem per sequence, as in the demo.
"""

from __future__ import annotations

import copy
import itertools

import torch

from undo_core.attacks import few_shot, quantise_
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.evaluation.metrics import evaluate
from undo_core.models import build_model
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy
from undo_core.unlearning import UnlearnConfig, unlearn

SHAPE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LENGTH = 8


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    tokenizer = character_tokenizer("0123456789+-*/=")
    tests = {operation: _problems(tokenizer, operation) for operation in "*+"}
    both = Sequences.joined(list(tests.values()))
    print("| pretrained on | model | probe | products | sums |")
    print("| --- | --- | --- | ---: | ---: |")
    for name, text in (("single", both), ("packed", few_shot(both, both, 2, seed=0, positions=64)[0])):
        original = build_model(SHAPE, tokenizer, 0)
        loss = lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"])  # noqa: E731
        config = TrainConfig(steps=400, batch_size=50, lr=5e-3, schedule="cosine")
        train(original, loss, {"text": sequence_source(text, 50, 0)}, config, progress=False)
        unlearned = copy.deepcopy(original)
        how = UnlearnConfig(train=TrainConfig(steps=40, batch_size=25, lr=2e-3))
        unlearn(unlearned, forget=tests["*"], retain=tests["+"], config=how, progress=False)
        for title, model in (("original", original), ("unlearn", unlearned)):
            for probe, scores in _probes(model, tests).items():
                print(f"| {name} | {title} | {probe} | " + " | ".join(f"{score:.2f}" for score in scores) + " |", flush=True)


def _probes(model: torch.nn.Module, tests: dict[str, Sequences]) -> dict[str, list[float]]:
    found = {"none": [evaluate(model, sequences)["value"] for sequences in tests.values()]}
    for shots in (1, 2, 4):
        prompted = [few_shot(sequences, tests["*"], shots, seed=0, positions=64)[0] for sequences in tests.values()]
        found[f"{shots} shots"] = [evaluate(model, sequences)["value"] for sequences in prompted]
    for bits in (8, 4, 2):
        rounded = copy.deepcopy(model)
        quantise_(rounded, bits, 32)
        found[f"int{bits}"] = [evaluate(rounded, sequences)["value"] for sequences in tests.values()]
    return found


def _problems(tokenizer: object, operation: str) -> Sequences:
    texts = [f"{a}{operation}{b}={a * b if operation == '*' else a + b}" for a, b in itertools.product(range(5), repeat=2)]
    ids, answers = torch.zeros(len(texts), LENGTH, dtype=torch.int32), torch.zeros(len(texts), LENGTH, dtype=torch.bool)
    for sequence, text in enumerate(texts):
        tokens = [1, *tokenizer.encode(text, add_special_tokens=False), 1]
        ids[sequence, : len(tokens)] = torch.tensor(tokens)
        answers[sequence, 5 : len(tokens)] = True
    return Sequences(ids, 0, answers)


if __name__ == "__main__":
    main()
