"""The ten lines of the README run with a user's model and batches, without YAML."""

import copy
import re
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_ten_lines_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (example,) = [block for block in blocks if "distill(student, teacher" in block]
    assert len([line for line in example.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 10

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    before = copy.deepcopy(model.state_dict())
    batches = lambda low: [{"input_ids": torch.randint(low, low + 32, (4, 12))} for _ in range(3)]  # noqa: E731
    forget, retain = batches(0), batches(32)
    names = {"model": model, "forget_batches": forget, "retain_batches": retain, "all_batches": forget + retain}
    names["my_metrics"] = lambda m: {"forget": float(m(input_ids=forget[0]["input_ids"], labels=forget[0]["input_ids"]).loss)}
    small = (
        example.replace("steps=1000", "steps=3")
        .replace("[0, 50, 100]", "[0, 1, 2]")
        .replace("headline_step=100", "headline_step=2")
    )
    exec(small, names)

    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the user's model is left alone"
    student, curves = names["student"], names["curves"]
    assert not all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(value.isfinite().all() for value in student.state_dict().values())
    assert all([point["step"] for point in curve.history] == [0, 1, 2] for curve in curves.values())
