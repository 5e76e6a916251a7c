"""Stages and losses that are trained on several ranks and on one, and the gradients of their first step."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from undo_core import distributed
from undo_core.attacks.config import AttackConfig, LoraConfig
from undo_core.attacks.relearning import attack
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.distillation.cache import CachedTeacher, cache_teacher
from undo_core.distillation.on_policy import OnPolicyConfig
from undo_core.distillation.student import distill
from undo_core.distillation.teacher import ModelTeacher, TeacherConfig
from undo_core.models import build_model
from undo_core.pipeline.stages.pretrain import next_token_loss
from undo_core.training import Source, TrainConfig, sequence_source, train
from undo_core.training.optimizers import Updater
from undo_core.unlearning import METHODS, RMUConfig, UnlearnConfig, unlearn
from undo_core.unlearning.ilu import ILUConfig
from undo_core.unlearning.repnoise import RepNoiseConfig

VOCABULARY = 17


def demo(seed: int = 0) -> nn.Module:
    """The demo's architecture, tied, in small: Gemma 2 with soft-capped logits and attention."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    settings = {"model_type": "gemma2", "num_key_value_heads": 1, "query_pre_attn_scalar": 8, "max_position_embeddings": 64}
    return _wider(build_model({**settings, **sizes, "sliding_window": 64}, character_tokenizer("0123456789+-*/="), seed))


def untied(seed: int = 0) -> nn.Module:
    """A Llama whose head has a weight of its own."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _wider(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **sizes)))


def tied(seed: int = 0) -> nn.Module:
    """A GPT-2, tied, with biases and dropout."""
    torch.manual_seed(seed)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    return _wider(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, attn_implementation="eager", **sizes, **special)))


def _wider(model: nn.Module) -> nn.Module:
    """Makes the logits far from uniform, so that gradients are not small by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {"demo": demo, "untied": untied, "tied": tied}


def sequences(count: int = 40, seed: int = 0) -> Sequences:
    """Sequences of different lengths; the padding is at the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (count, 10), generator=generator, dtype=torch.int32)
    lengths = torch.randint(4, 11, (count, 1), generator=generator)
    return Sequences(ids.masked_fill(torch.arange(10) >= lengths, 0), 0)


CONFIG = TrainConfig(steps=1, batch_size=7, micro_batch_size=None, lr=1e-2, clip=1.0, optimizer="sgd", beta1=0.9, seed=3)


def pretraining(model: nn.Module, config: TrainConfig, source: Source | None = None, **more: Any) -> Any:
    source = source or sequence_source(sequences(), config.batch_size, 0)
    return train(model, next_token_loss, {"text": source}, config, progress=False, **more)


def unlearning(method: str, **settings: Any) -> Callable[..., Any]:
    def run(model: nn.Module, config: TrainConfig, **more: Any) -> Any:
        own = {"rmu": RMUConfig(trained="*down_proj.weight" if not hasattr(model, "transformer") else "*mlp.c_proj.weight")}
        made = UnlearnConfig(method=method, train=config, **{**({} if method != "rmu" else own), **settings})
        return unlearn(model, forget=sequences(seed=1), retain=sequences(seed=2), config=made, progress=False, **more)

    return run


def distillation(kind: str, **settings: Any) -> Callable[..., Any]:
    def run(model: nn.Module, config: TrainConfig, folder: Path | None = None, **more: Any) -> Any:
        teacher = type(model)(model.config)
        teacher.load_state_dict(model.state_dict())
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(1.1)
        text = sequences()
        scratch = Path(distributed.on_first(tempfile.mkdtemp))
        known: Any = teacher
        if kind == "streamed":
            distributed.on_first(lambda: teacher.save_pretrained(scratch))
            known = ModelTeacher.streamed(scratch)
        elif kind != "resident":
            made = TeacherConfig(kind, k=5)
            distributed.on_first(lambda: cache_teacher(teacher, text, scratch, made, progress=False) and None)
            known = CachedTeacher.open(scratch, teacher)
        result = distill(model, known, text, config, folder=folder, progress=False, **settings, **more)
        distributed.on_first(lambda: shutil.rmtree(scratch))
        return result

    return run


def relearning(**settings: Any) -> Callable[..., Any]:
    def run(model: nn.Module, config: TrainConfig, **more: Any) -> Any:
        common = {name: getattr(config, name) for name in ("clip", "precision", "optimizer", "seed")}
        own = AttackConfig(
            rates=[config.lr], evaluate_at=[0, config.steps], headline_step=config.steps, batch_size=10, **common
        )
        own = dataclasses.replace(own, **settings)
        texts = {"retain": sequences(seed=2)} if "retain" in own.mix else {}
        return attack(
            model, sequences(seed=1), config.lr, own, evaluate=lambda model: {"forget": 0.0}, progress=False, **texts, **more
        )

    return run


STAGES: dict[str, Callable[..., Any]] = {
    "pretrain": pretraining,
    **{name: unlearning(name) for name in METHODS},
    "rmu-all": unlearning("rmu", rmu=RMUConfig(normalize="all", trained="*weight")),
    "rmu-sequence": unlearning("rmu", rmu=RMUConfig(normalize="sequence", trained="*weight")),
    "retain-kl": unlearning("maxent", retain_loss="kl"),
    "sam": unlearning("maxent", robust="sam"),
    "ilu": unlearning("maxent", robust="ilu", ilu=ILUConfig(step=0.25)),  # a small step enlarges the rounding of reductions
    "repnoise": unlearning("maxent", robust="repnoise", repnoise=RepNoiseConfig(samples=16)),
    "repnoise-distance": unlearning("rmu", robust="repnoise", repnoise=RepNoiseConfig(alpha=0.0)),
    **{f"distill-{kind}": distillation(kind) for kind in ("resident", "streamed", "cached", "topk")},
    "distill-hidden": distillation("resident", hidden_weight=0.5),
    "distill-on-policy": distillation("resident", on_policy=OnPolicyConfig(1.0, 1.0, prompt=3)),
    "relearn": relearning(),
    "relearn-mix": relearning(mix={"forget": 0.5, "retain": 0.5}),
    "relearn-lora": relearning(kind="lora", lora=LoraConfig(rank=2)),
}


def first_gradients(model: nn.Module, stage: Callable[..., Any], config: TrainConfig = CONFIG) -> dict[str, torch.Tensor]:
    """Returns the whole gradients, by parameter name, that the first step of a stage would apply before clipping."""
    with _kept() as found:
        stage(model, config)
    return found


@contextlib.contextmanager
def _kept() -> Iterator[dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}
    step, begin = Updater.step, Updater.__init__

    def named(self: Updater, model: nn.Module, parameters: list[nn.Parameter], config: TrainConfig) -> None:
        begin(self, model, parameters, config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.names = [names[id(parameter)] for parameter in parameters]

    def stepped(self: Updater) -> None:
        for name, parameter, target in zip(self.names, self.parameters, self.targets, strict=True):
            gradient = parameter.grad if parameter.grad is not None else target.grad
            if gradient is not None and not found.get(name) is not None:
                found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
        step(self)

    Updater.__init__, Updater.step = named, stepped
    try:
        yield found
    finally:
        Updater.__init__, Updater.step = begin, step


def largest_error(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference, relative to the gradient's own norm, or to a millionth of the largest one."""
    assert got.keys() == wanted.keys() and wanted
    floor = 1e-6 * max(float(tensor.norm()) for tensor in wanted.values())
    return max(float((got[name] - tensor).norm() / tensor.norm().clamp_min(floor)) for name, tensor in wanted.items())
