"""The noise's policy for each parameter of every causal class of transformers, against the class's own initialisation."""

import math

import causal_models
import pytest
import torch
from rounding import assert_rounded, gamma
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from undo_core import damage_, noise_
from undo_core.noise.checkpoint import noise_checkpoint
from undo_core.noise.damage import damage_checkpoint

NAMES = [name for name in causal_models.names() if name not in causal_models.NOT_TINY]

# Parameters of two or more dimensions, other than biases, that are not the matrix of a product.
NO_MATRICES = {
    "A_log",
    "D",
    "query",
    "scale",
    "static_weight",
    "mask_emb",
    "time_mix_key",
    "time_mix_receptance",
    "time_mix_value",
}

# Text modules of models with other modalities.
_WRAPPED = ("model.language_model.", "lm_head.")
TEXT = dict.fromkeys(("fuyu", "gemma3", "gemma4", "gemma4_unified", "got_ocr2", "moss_transcribe_diarize"), _WRAPPED)
TEXT |= {"git": ("git.embeddings.", "git.encoder.", "output.")}
TEXT |= {"phi4_multimodal": ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")}

# One of each structure: experts, recurrent layers, frozen parameters, towers, ties, Conv1D.
ON_DISK = [
    "afmoe",
    "apertus",
    "bamba",
    "bert",
    "bloom",
    "blt",
    "dbrx",
    "deepseek_v3",
    "deepseek_v4",
    "ernie4_5_moe",
    "falcon_h1",
]
ON_DISK += [
    "fuyu",
    "gemma3",
    "gemma4",
    "gpt2",
    "gpt_oss",
    "inkling2_text",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "llama4_text",
    "mamba",
]
ON_DISK += ["mamba2", "marian", "nemotron_h", "openai-gpt", "opt", "phi4_multimodal", "qwen3_5", "qwen3_next", "rwkv", "zamba"]

ALPHA, BETA, SEED = 0.5, 0.75, 11


def starts(model, seed):
    """Returns another model of this class and configuration, as transformers makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(type(model)(model.config).named_parameters())


def moved(model):
    """Returns the model with every parameter moved from its start, and its parameters in float64."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return {name: parameter.detach().double() for name, parameter in model.named_parameters()}


def owners(model):
    """Returns the module and the local name of each parameter, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }


def fans(module, name, shape):
    """Returns fan in plus fan out of one matrix."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return (shape[0] + shape[1]) * math.prod(shape[2:])
    if type(module).__name__ == "DbrxExpertGLU":
        return shape[0] // 4 + shape[1]  # four experts, one below the other
    if type(module).__name__ == "XLNetRelativeAttention" and name in "qkvor":
        return shape[0] + shape[1] * shape[2]
    return shape[-1] + shape[-2]


def is_vector(module, name, parameter):
    if isinstance(module, (nn.Linear, nn.Embedding, Conv1D, nn.modules.conv._ConvNd)) and name == "weight":
        return False
    return parameter.ndim < 2 or "bias" in name or name in NO_MATRICES


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_moves_as_the_policy_says(name):
    model = causal_models.build(name)
    where, first, second = owners(model), starts(model, 1), starts(model, 2)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # as transformers' from_pretrained does
    before = moved(model)
    report = noise_(model, alpha=ALPHA, beta=BETA, seed=SEED)
    after = {n: p.detach().double() for n, p in model.named_parameters()}

    text = {n for n in before if n.startswith(TEXT.get(name, ""))}
    assert {n for n, left in report.left.items() if left.reason == "frozen"} == frozen
    assert {n for n, left in report.left.items() if left.reason == "not text"} == set(before) - text - frozen
    assert set(report) == text - frozen and len(report) + len(report.left) == len(before), "nothing without an initial value"
    assert sum(left.share for left in report.left.values()) == pytest.approx(
        sum(before[n].numel() for n in report.left) / sum(p.numel() for p in before.values())
    )
    drawn = {}
    for n, theta in before.items():
        if n in report.left:
            assert torch.equal(after[n], theta), n
        elif is_vector(*where[n], theta):
            assert report[n].noise == 0, n
            if torch.equal(first[n], second[n]):
                wanted = first[n].double()
                assert_rounded(after[n], (1 - ALPHA) * theta + ALPHA * wanted, theta.abs() + wanted.abs())
            else:
                drawn[n] = (after[n] - (1 - ALPHA) * theta) / ALPHA
        else:
            limit = math.sqrt(6 / fans(*where[n], theta.shape))
            units = (after[n] - (1 - ALPHA) * theta) / (ALPHA * BETA * limit)
            size = units.numel()
            rounded = gamma(6) * (
                1 + (1 - ALPHA) * theta.abs() / (ALPHA * BETA * limit)
            )  # two products and a sum, factors included
            assert (units.abs() <= 1 + rounded).all(), n
            if size >= 64:
                assert units.abs().max() > 1 - 20 / size, f"{n}: the largest of {size} draws is smaller with a chance of e**-20"
                # Six standard deviations, which one seed in 500 million exceeds; the seed is the same everywhere.
                assert abs(units.square().mean() - 1 / 3) < 6 * math.sqrt(4 / 45 / size), (
                    f"{n}: the variance of the uniform law"
                )
    if drawn:  # as many draws lie below the median as above it
        samples = [starts(model, seed) for seed in range(3, 27)]
        for n, target in drawn.items():
            rounded = gamma(6) * float((before[n].abs().max() + target.abs().max()) / ALPHA)
            assert (target - target.flatten()[0]).abs().max() <= 2 * rounded, n
            draws = torch.stack([sample[n].detach().double() for sample in samples])
            below = (draws < target).double().mean()
            # Six standard deviations again.
            assert abs(below - 0.5) < 6 * 0.5 / math.sqrt(draws.numel()), f"{n}: {float(below):.0%} of the draws lie below"


@pytest.mark.parametrize("name", ON_DISK)
def test_a_checkpoint_gets_the_bits_of_the_model_in_memory(name, tmp_path):
    model = causal_models.build(name)
    moved(model)
    folders = {part: tmp_path / part for part in ("source", "noised", "damaged", "wanted")}
    model.save_pretrained(folders["source"])
    for part in ("noised", "damaged"):
        folders[part].mkdir()
    rounds = {
        "noised": (noise_checkpoint, noise_, {"alpha": ALPHA, "seed": SEED}),
        "damaged": (damage_checkpoint, damage_, {"operator": "gaussian", "strength": 0.5, "seed": SEED}),
    }
    for part, (on_disk, in_memory, options) in rounds.items():
        facts = on_disk(folders["source"], folders[part], **options, progress=False)
        here = AutoModelForCausalLM.from_pretrained(folders["source"], dtype=torch.float32)
        report = in_memory(here, **options)
        here.save_pretrained(folders["wanted"])
        wanted, got = (load_file(folders[folder] / "model.safetensors") for folder in ("wanted", part))
        assert wanted.keys() == got.keys()
        for n in wanted:
            assert torch.equal(wanted[n], got[n]), n
        if part == "noised":
            assert facts == report and facts.left == report.left
            matrices = {n for n, norms in report.items() if norms.noise}
        else:
            assert facts["tensors"] == report and report.keys() == matrices, "what gets noise is what is damaged"
