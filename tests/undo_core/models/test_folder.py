"""What ``config.json`` says about how a model runs is left to this machine; what it says about the weights is not."""

import json
import warnings

import pytest
import torch
from hostile_readers import checkpoint
from safetensors.torch import load_file, save_file

from undo_core.models import load_model

INPUT = torch.arange(5)[None]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint folder, its configuration, and its logits."""
    folder = checkpoint(tmp_path_factory.mktemp("folder"))
    return folder, json.loads((folder / "config.json").read_text()), load_model(folder)(input_ids=INPUT).logits


@pytest.fixture
def changed(stored):
    """Changes entries of the configuration for one test; returns the folder and the logits."""
    folder, settings, logits = stored

    def change(**entries):
        (folder / "config.json").write_text(json.dumps({**settings, **entries}))
        return folder, logits

    yield change
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("entry", "value", "absent"),
    [
        ("_attn_implementation", "flash_attention_2", "flash_attention_2"),
        ("attn_implementation", "flash_attention_3", "flash_attention_3"),
        ("attn_implementation", {"": "flash_attention_2"}, "flash_attention_2"),
        ("_attn_implementation", "flex_attention", "flex_attention"),  # has no backward pass on a CPU
        ("_attn_implementation", "paged|sdpa", r"paged\|sdpa"),
        ("_experts_implementation", "deepgemm", "deepgemm"),
    ],
)
def test_an_implementation_that_may_be_absent_is_said_and_not_needed(changed, entry, value, absent):
    folder, logits = changed(**{entry: value})
    with pytest.warns(UserWarning, match=rf"config\.json: got {absent}; the model runs with what this machine has$"):
        model = load_model(folder)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(input_ids=INPUT).logits, logits)


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "sdpa"}, {"dtype": "auto"}, {"torch_dtype": "bfloat16"}, {"dtype": "of another age"},
        {"return_dict": False}, {"output_hidden_states": True}, {"output_attentions": True}, {"use_cache": False},
        {"quantization_config": None}, {"surprise": {"a": [1]}},
    ],
    ids=str,
)  # fmt: skip
def test_what_says_how_a_model_runs_changes_no_output(changed, entries):
    folder, logits = changed(**entries)
    with warnings.catch_warnings(action="error", category=UserWarning):
        found = load_model(folder)(input_ids=INPUT)
    assert torch.equal(found.logits, logits) and found.hidden_states is None and found.attentions is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "of another age", "bits": 4}, "quant_method 'of another age'"),
        ({"bits": 4}, "no `quant_method`"),
        ({"quant_method": "gptq", "bits": 4}, "gptq|GPTQ"),  # transformers knows it, and names the package that it needs
        ("int4", "to_dict"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(changed, settings, said):
    folder, _ = changed(quantization_config=settings)
    with pytest.raises(ValueError, match=said) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_weight_that_is_not_there_is_named(changed):
    """transformers would draw it at random and go on."""
    folder, _ = changed()
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file({key.replace("q_proj.weight", "q_proj.qweight"): value for key, value in weights.items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"which has no {name} \(\d+ weights in all\); wanted a whole checkpoint"):
        load_model(folder)
    save_file(weights, path, {"format": "pt"})
