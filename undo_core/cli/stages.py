"""Commands for the stages of the method alone, on Hugging Face checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from undo_kernels.ops.noise_rules import NoiseRule, Policy, outside

from undo_core.attacks.config import AttackConfig, Trial, check_installed, with_seed
from undo_core.attacks.grid import explore
from undo_core.cli.folders import build, check_checkpoint, check_prepared, print_left, print_noise
from undo_core.damage import Operator, check_arguments, selection
from undo_core.files import read_json, write_json
from undo_core.noise_checkpoint import describe_replay, replay_checkpoint
from undo_core.parameters import Parts
from undo_core.pipeline.attacked import trial_stage
from undo_core.pipeline.config import DataConfig, ModelConfig
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.stage import Folder
from undo_core.pipeline.stages import Cache, Damage, Distill, Noise, Replay, Unlearn
from undo_core.pipeline.stages.prepare import prepare_stage
from undo_core.teacher import TeacherConfig
from undo_core.teacher_cache import FACTS
from undo_core.training.config import TrainConfig
from undo_core.training.progress import console
from undo_core.unlearning.config import UnlearnConfig


def prepare(output: str, data: DataConfig, model: ModelConfig, seed: int = 0) -> int:
    """Tokenise and split the data into OUTPUT, beside the model that it is for.

    Args:
        output: folder to make; the other commands take it as DATA.
        data: what is retained and what is forgotten.
        model: an architecture to initialise, or the folder of a checkpoint, whose tokenizer is then used.
        seed: of everything that is drawn.
    """
    build(output, prepare_stage(data, model, seed))
    return 0


def unlearn(model: str, output: str, data: str, config: UnlearnConfig = UnlearnConfig()) -> int:
    """Suppress the forget rows' capability in the checkpoint MODEL and write the result to OUTPUT.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        data: folder made by ``undo prepare``.
        config: method and training.
    """
    build(output, Unlearn(config=config, prepared=_folder(data), model=_folder(model)))
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

    From disk to disk, a tensor at a time, in the checkpoint's own dtype; a model of any size fits. Matrices of products and embeddings
    get noise; norms, biases and all other parameters shrink toward their initial values. For some parameters otherwise:
    --rules='[{match: embeddings, alpha: 0.2}, {match: "model.layers.0.*", alpha: 0}]'

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make; with --replay, - prints.
        alpha: strength, in [0, 1].
        beta: scale of the noise.
        seed: of N.
        law: of N.
        std: of the normal law.
        rules: other settings for some parameters; match is a glob over names, or matrices, vectors, embeddings or layers:0-3,7, with
            "not " before it for the others; later rules win.
        layers: only these layers are noised, such as 0-3,7.
        parts: what is noised of a model that knows images or sound too: text (its decoder, embeddings and head) or all.
        stochastic_rounding: of 16-bit parameters; false rounds to nearest.
        replay: write N itself of the parameters that match this glob ('*' for all) to OUTPUT/noise.safetensors, for audit; the model
            is left as it is. OUTPUT - prints norms, hashes and first values.
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
    """Damage the matrices of the checkpoint MODEL otherwise than `undo noise` does and write the result to OUTPUT.

    gaussian adds noise in proportion to each matrix's root mean square; prune zeroes the smallest entries; permute, permute-rows and
    permute-columns move entries, rows or columns. With --alpha, as much as the published noise would: the strength is found for which
    |theta' - theta| / |theta| over all matrices is the same. From disk to disk; norms and biases stay as they are.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        operator: gaussian, prune, permute, permute-rows or permute-columns.
        strength: share of what is pruned or permuted, or the factor of gaussian; or
        alpha: of the noise whose distance is wanted.
        beta: of that noise.
        layers: only these layers, such as 0-3,7.
        parts: what is damaged of a model that knows images or sound too: text (its decoder, embeddings and head) or all.
        seed: of what is drawn.
    """
    if (strength is None) == (alpha is None):
        raise ValueError(f"strength: got {strength} with alpha {alpha}, wanted one of the two")
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
    """Run the checkpoint TEACHER once over DATA and keep in OUTPUT what `undo distill --cache=OUTPUT` needs of it.

    Any number of students, orders and seeds can then learn from it without its layers in memory. float32 gives the student that the
    teacher itself gives; the errors of bfloat16 and topk are measured and printed.

    Args:
        teacher: Hugging Face checkpoint folder of the suppressed model.
        output: folder to make.
        data: folder made by ``undo prepare``.
        dtype: of the stored hidden states; bytes a position: width times 4 or 2.
        topk: store this many most likely tokens at each position instead, 8 bytes each; approximate.
        batch_size: rows of a forward pass; take the distillation's micro-batch size to get its bits.
        streamed: read the teacher's layers from disk for each forward pass, for a teacher larger than the memory.
        vocab_size: number of real tokens, where the teacher's head has more rows than that; null for all rows.
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
) -> int:
    """Train the checkpoint STUDENT to match the checkpoint TEACHER and write the result to OUTPUT.

    Args:
        teacher: Hugging Face checkpoint folder of the suppressed model.
        student: Hugging Face checkpoint folder of the damaged model.
        output: folder to make.
        data: folder made by ``undo prepare``.
        train: optimizer, rates, batch sizes.
        recover: stop within this of the teacher's retain performance (absolute accuracy, relative loss); null trains for train.steps.
        streamed: read the teacher's layers from disk for each forward pass instead of holding them; same result.
        cache: folder made from TEACHER and DATA by ``undo cache``; only the teacher's head is then held.
        hidden_weight: factor on the relative squared error of the student's hidden states, beside the logits' KL; not with cache.
        hidden_layers: after how many layers, the last after the final norm; null for every layer.
        vocab_size: number of real tokens, where a head has more rows than that, which are then left out; null for all rows, or the smaller
            number of rows of TEACHER and STUDENT where their tokenizers agree.
    """
    config, source = TeacherConfig("streamed" if streamed else "resident"), None
    if cache is not None:
        if streamed:
            raise ValueError("streamed: got true with cache, wanted one of the two")
        if not (Path(cache) / FACTS).is_file():
            raise FileNotFoundError(f"cache: got {cache}, which has no {FACTS}; wanted a folder made by `undo cache`")
        made = read_json(Path(cache) / FACTS)["identity"]
        config = TeacherConfig(**{name: made[name] for name in ("kind", "dtype", "k", "vocab_size") if name in made})
        source = Folder(Path(cache), (FACTS,))  # its facts hold the hashes of what it was made from; its bytes can be many
    stage = Distill(
        train=train,
        recover=recover,
        config=config,
        vocab_size=vocab_size,
        hidden_weight=hidden_weight,
        hidden_layers=hidden_layers,
        prepared=_folder(data),
        teacher=_folder(teacher),
        student=_folder(student),
        cache=source,
    )
    build(output, stage)
    return 0


def relearn(model: str, output: str, data: str, config: AttackConfig = AttackConfig()) -> int:
    """Attack the checkpoint MODEL at every learning rate; one folder a rate under OUTPUT, and the curves in OUTPUT/curves.json.

    With --kind=lora by adapters, which are merged; --kind=fewshot and --kind=quantise train nothing and have one folder for each of
    --shots or --bits.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        data: folder made by ``undo prepare``.
        config: the grid and the evaluations.
    """
    check_installed(config.kind)
    config = with_seed(config, 0)
    check_prepared(Path(data))
    accuracy = load_split(Path(data), "test_forget").answer_mask is not None

    def curve_of(trial: Trial) -> list[dict[str, Any]]:
        stage = trial_stage(config, trial, _folder(data), _folder(model), "")
        curve = build(Path(output) / trial.name, stage, quiet=True)["curve"]
        line = "  ".join(f"{point['step']}: {point['forget']['value']:.3f}" for point in curve)
        console.print(f"{trial.name.replace('-', ' ', 1)}   forget at step  {line}")
        return curve

    curves = explore(config, curve_of, accuracy)
    ordered = sorted(curves, key=lambda trial: (trial.rate or 0, trial.order))
    path = Path(output) / "curves.json"
    write_json(path, {trial.name.removeprefix("rate-"): curves[trial] for trial in ordered})
    console.print(str(path))
    return 0


def _folder(path: str) -> Folder:
    return Folder(Path(path))
