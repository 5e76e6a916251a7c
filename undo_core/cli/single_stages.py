"""Commands that run one stage of the method by itself, on Hugging Face checkpoint folders."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from undo_kernels.ops.noise_rules import NoiseRule, Policy, outside

from undo_core import distributed
from undo_core.attacks.config import AttackConfig, Trial, check_installed, with_seed
from undo_core.attacks.grid import explore
from undo_core.cli.folders import build, check_prepared, print_left, print_noise
from undo_core.data.config import DataConfig
from undo_core.distillation.cache import FACTS, read_facts
from undo_core.distillation.on_policy import OnPolicyConfig
from undo_core.distillation.teacher import TeacherConfig
from undo_core.distributed.config import ParallelConfig
from undo_core.io.files import write_json
from undo_core.io.progress import console
from undo_core.models.config import ModelConfig
from undo_core.models.folder import check_checkpoint
from undo_core.noise.checkpoint import describe_replay, replay_checkpoint
from undo_core.noise.damage import Operator, check_arguments, selection
from undo_core.noise.parameters import Parts
from undo_core.pipeline.attacked_model import trial_curve, trial_stage
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.stage import Folder
from undo_core.pipeline.stages import Cache, Damage, Distill, Noise, Replay, Unlearn
from undo_core.pipeline.stages.prepare import prepare_stage
from undo_core.training.config import TrainConfig
from undo_core.unlearning.config import UnlearnConfig


def prepare(output: str, data: DataConfig, model: ModelConfig, seed: int = 0) -> int:
    """Tokenise and split the data and write them to OUTPUT, together with the model that will read them.

    Args:
        output: folder to make; the other commands take it as DATA.
        data: what is retained and what is forgotten.
        model: an architecture to initialise, or a checkpoint folder, whose tokenizer is then used.
        seed: seed from which the others derive.
    """
    build(output, prepare_stage(data, model, seed))
    return 0


def unlearn(
    model: str, output: str, data: str, config: UnlearnConfig = UnlearnConfig(), parallel: ParallelConfig = ParallelConfig()
) -> int:
    """Suppress the capability shown by the forget data in the checkpoint MODEL and write the result to OUTPUT.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        data: folder made by ``undo prepare``.
        config: method and training.
        parallel: how the ranks of torchrun work together.
    """
    distributed.arrange(parallel)
    build(output, Unlearn(config=config, prepared=_folder(data), model=_folder(model)))
    console.print(f"to see what it has forgotten: undo evaluate {shlex.quote(output)} {shlex.quote(data)}", soft_wrap=True)
    return 0


def noise(
    model: str,
    output: str,
    alpha: float = 0.6,
    beta: float = 0.1,
    seed: int = 0,
    law: Literal["xavier_uniform", "xavier_normal", "normal"] = "xavier_uniform",
    std: float | None = None,
    rules: list[NoiseRule] = [],  # noqa: B006
    layers: str | None = None,
    parts: Parts = "text",
    stochastic_rounding: bool = True,
    replay: str | None = None,
) -> int:
    """Damage the checkpoint MODEL and write the result to OUTPUT: theta <- (1 - alpha) * theta + alpha * beta * N.

    Works from disk to disk, one tensor at a time and in the checkpoint's dtype, so that a model of any size fits in memory.
    Weight matrices and embeddings get noise; norms, biases and all other parameters shrink toward their initial values. Rules
    change this for some parameters: --rules='[{match: embeddings, alpha: 0.2}, {match: "model.layers.0.*", alpha: 0}]'

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make; with --replay, - prints instead.
        alpha: strength, in [0, 1].
        beta: scale of the noise.
        seed: seed of N.
        law: distribution of N.
        std: standard deviation of the normal law.
        rules: other settings for some parameters. match is a glob over names, or matrices, vectors, embeddings or layers:0-3,7;
            with "not " before it, it selects all others. Later rules win.
        layers: noise only these layers, such as 0-3,7.
        parts: which part of a multimodal model is noised: text (its decoder, embeddings and head) or all.
        stochastic_rounding: round 16-bit parameters stochastically; false rounds to nearest.
        replay: write N itself to OUTPUT/noise.safetensors for the parameters that match this glob ('*' for all), and no model:
            it shows which noise a damaged checkpoint received. With - as OUTPUT, print norms, hashes and first values.
    """
    rules = (*rules, *(() if layers is None else (outside(layers),)))
    drawn: dict[str, Any] = {"law": law, "seed": seed, "std": std, "rules": rules}
    if replay is not None:
        check_checkpoint("model", Path(model))
        if output == "-":
            for name, values in replay_checkpoint(Path(model), replay, **drawn):
                console.print(f"{name}  {describe_replay(values)}")
        else:
            build(output, Replay(pattern=replay, **drawn, model=_folder(model)))
        return 0
    Policy(alpha, beta, law, std, rules)
    stage = Noise(
        alpha=alpha,
        beta=beta,
        **drawn,
        parts=parts,
        stochastic_rounding=stochastic_rounding,
        model=_folder(model),
        recorded=("std", "rules", "parts", "stochastic_rounding"),
    )
    print_noise(build(output, stage))
    return 0


def damage(
    model: str,
    output: str,
    operator: Operator,
    strength: float | None = None,
    alpha: float | None = None,
    beta: float = 0.1,
    layers: str | None = None,
    parts: Parts = "text",
    seed: int = 0,
) -> int:
    """Damage the matrices of the checkpoint MODEL with an operator other than `undo noise` and write the result to OUTPUT.

    gaussian adds noise in proportion to each matrix's root mean square; prune zeroes the smallest entries; permute,
    permute-rows and permute-columns move entries, rows or columns. With --alpha, the damage matches that of the published
    noise: the strength is chosen so that |theta' - theta| / |theta| over all matrices is the same. Works from disk to disk;
    norms and biases do not change.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        operator: gaussian, prune, permute, permute-rows or permute-columns.
        strength: share that is pruned or permuted, or the factor of gaussian; give this or alpha.
        alpha: strength of the published noise whose distance is matched.
        beta: scale of that noise.
        layers: damage only these layers, such as 0-3,7.
        parts: which part of a multimodal model is damaged: text (its decoder, embeddings and head) or all.
        seed: seed of the random draws.
    """
    if (strength is None) == (alpha is None):
        raise ValueError(f"strength: got {strength} with alpha {alpha}, wanted exactly one of the two")
    check_arguments(operator, strength or 0.0, seed)
    selection(layers)
    like = None
    if alpha is not None:
        Policy(alpha, beta)
        like = {"alpha": alpha, "beta": beta, "seed": seed}
    stage = Damage(
        operator=operator,
        seed=seed,
        layers=layers,
        strength=strength,
        like=like,
        parts=parts,
        model=_folder(model),
        recorded=("parts",),
    )
    facts = build(output, stage)
    wanted = "" if facts["wanted"] is None else f", the noise's {facts['wanted']:.4f}"
    console.print(f"strength {facts['strength']:.6g}: distance {facts['distance']:.4f}{wanted}")
    print_left(facts)
    return 0


def cache(
    teacher: str,
    output: str,
    data: str,
    dtype: Literal["float32", "bfloat16"] = "float32",
    topk: int | None = None,
    batch_size: int = 128,
    streamed: bool = False,
    vocab_size: int | None = None,
) -> int:
    """Run the checkpoint TEACHER once over DATA and store in OUTPUT the outputs that `undo distill --cache=OUTPUT` needs.

    Any number of students, with any data order and seed, can then learn from it without the teacher's layers in memory. With
    float32 the student is the same as without a cache; the errors of bfloat16 and topk are measured and printed.

    Args:
        teacher: Hugging Face checkpoint folder of the suppressed model.
        output: folder to make.
        data: folder made by ``undo prepare``.
        dtype: dtype of the stored hidden states; they take 4 or 2 bytes times the width for each token.
        topk: store this many most likely tokens for each position instead, 8 bytes each; approximate.
        batch_size: sequences in a forward pass; use the micro-batch size of the distillation for results equal to the bit.
        streamed: read the teacher's layers from disk in each forward pass, for a teacher that does not fit in memory.
        vocab_size: number of real tokens, for a teacher whose head is padded to more vocabulary entries; null for all.
    """
    stored = {"kind": "cached", "dtype": dtype} if topk is None else {"kind": "topk", "dtype": dtype, "k": topk}
    config = TeacherConfig(**stored, batch_size=batch_size, vocab_size=vocab_size)
    build(output, Cache(config=config, streamed=streamed, prepared=_folder(data), teacher=_folder(teacher)))
    return 0


def distill(
    teacher: str,
    student: str,
    output: str,
    data: str,
    train: TrainConfig = TrainConfig(),
    recover: float | None = 0.05,
    streamed: bool = False,
    cache: str | None = None,
    hidden_weight: float = 0.0,
    hidden_layers: list[int] | None = None,
    vocab_size: int | None = None,
    on_policy: OnPolicyConfig = OnPolicyConfig(),
    parallel: ParallelConfig = ParallelConfig(),
) -> int:
    """Train the checkpoint STUDENT to match the checkpoint TEACHER and write the result to OUTPUT.

    Args:
        teacher: Hugging Face checkpoint folder of the suppressed model.
        student: Hugging Face checkpoint folder of the damaged model.
        output: folder to make.
        data: folder made by ``undo prepare``.
        train: optimizer, learning rates, batch sizes.
        recover: stop within this distance of the teacher's retain performance (absolute for accuracy, relative for loss); null
            trains for train.steps.
        streamed: read the teacher's layers from disk in each forward pass instead of keeping them in memory; same result.
        cache: folder made from TEACHER and DATA by ``undo cache``; only the teacher's head is then kept in memory.
        hidden_weight: factor on the relative squared error of the student's hidden states, added to the KL of the logits; not
            with cache.
        hidden_layers: layers after which hidden states are compared: 0 is the embeddings, the last layer is taken after the
            final norm; null for every layer.
        vocab_size: number of real tokens, for a head that is padded to more vocabulary entries; the KL leaves the padding out.
            null for all entries or, if the heads of TEACHER and STUDENT differ in size and their tokenizers agree, for those
            of the smaller head.
        on_policy: steps that train on continuations which STUDENT draws, by the reverse KL; not with cache.
        parallel: how the ranks of torchrun work together.
    """
    distributed.arrange(parallel)
    config, source = TeacherConfig("streamed" if streamed else "resident"), None
    if cache is not None:
        if streamed:
            raise ValueError("streamed: got true with cache, wanted only one of the two")
        if not (Path(cache) / FACTS).is_file():
            raise FileNotFoundError(f"cache: got {cache}, which has no {FACTS}; wanted a folder made by `undo cache`")
        _, made = read_facts(Path(cache))
        on_policy.check(made["kind"])
        config = TeacherConfig(**{name: made[name] for name in ("kind", "dtype", "k", "vocab_size") if name in made})
        # Its facts, which hold the hashes of its inputs, are enough for the key; the cache itself can be large.
        source = Folder(Path(cache), (FACTS,))
    stage = Distill(
        train=train,
        recover=recover,
        config=config,
        vocab_size=vocab_size,
        hidden_weight=hidden_weight,
        hidden_layers=hidden_layers,
        on_policy=on_policy,
        prepared=_folder(data),
        teacher=_folder(teacher),
        student=_folder(student),
        cache=source,
    )
    build(output, stage)
    return 0


def relearn(
    model: str, output: str, data: str, config: AttackConfig = AttackConfig(), parallel: ParallelConfig = ParallelConfig()
) -> int:
    """Attack the checkpoint MODEL at every learning rate; write a folder for each rate and curves.json to OUTPUT.

    --kind=lora trains adapters and merges them. --kind=fewshot and --kind=quantise train nothing and write one folder for each
    value of --shots or --bits.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        data: folder made by ``undo prepare``.
        config: the grid and the evaluations.
        parallel: how the ranks of torchrun work together.
    """
    distributed.arrange(parallel)
    check_installed(config.kind)
    if config.together > 1:
        raise ValueError(
            f"together: got {config.together}, wanted 1: here each rate has a folder of its own; undo attack trains some at once"
        )
    config = with_seed(config, 0)
    check_prepared(Path(data))
    accuracy = load_split(Path(data), "test_forget").answer_mask is not None

    def curve_of(trial: Trial) -> list[dict[str, Any]]:
        stage = trial_stage(config, trial, _folder(data), _folder(model), "")
        curve = trial_curve(config, build(Path(output) / trial.name, stage, quiet=True))
        line = "  ".join(f"{point['step']}: {point['forget']['value']:.3f}" for point in curve)
        console.print(f"{trial.name.replace('-', ' ', 1)}   forget at step  {line}")
        return curve

    curves = explore(config, lambda trials: {trial: curve_of(trial) for trial in trials}, accuracy)
    ordered = sorted(curves, key=lambda trial: (trial.rate or 0, trial.order))
    path = Path(output) / "curves.json"
    found = {trial.name.removeprefix("rate-"): curves[trial] for trial in ordered}
    distributed.on_first(lambda: write_json(path, found))
    console.print(str(path))
    return 0


def _folder(path: str) -> Folder:
    return Folder(Path(path))
