"""What each subcommand of ``undo`` does. Docstrings are its help; heavy imports wait until a command runs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from undo_core.attacks.config import AttackConfig, Trial, check_installed, with_seed
from undo_core.attacks.grid import explore
from undo_core.damage import Operator, check_arguments, selection
from undo_core.data.questions import DESCRIPTION
from undo_core.ops.noise_rules import NoiseRule, Policy, outside
from undo_core.parameters import Parts
from undo_core.pipeline.config import DataConfig, ModelConfig, RunConfig
from undo_core.pipeline.sweep_config import SweepConfig
from undo_core.teacher import TeacherConfig
from undo_core.training.config import TrainConfig
from undo_core.training.progress import console
from undo_core.unlearning.config import UnlearnConfig


def run(config: RunConfig, command: str) -> int:
    """Run a configuration."""
    from undo_core.pipeline.run import run as run_pipeline

    run_pipeline(config, command)
    return 0


def sweep(config: SweepConfig, command: str, dry_run: bool) -> int:
    """Run a sweep, or print what it would run."""
    from undo_core.pipeline.sweep import run_sweep, sweep_table

    if dry_run:
        out = console if console.is_terminal else Console(width=120, highlight=False)
        out.print(sweep_table(config))
        return 0
    failures = run_sweep(config, command)
    for line in failures:
        print(f"undo: failed: {line}", file=sys.stderr)
    return 1 if failures else 0


def plan(config: RunConfig, memory: str | None = None) -> int:
    """Print what a configuration would do, and what to change for it to fit in ``memory``.

    Raises:
        ValueError: no change of settings makes it fit.
    """
    from undo_core.planning.table import bytes_of, fit_notes, plan_table

    limit = None if memory is None else bytes_of(memory)
    out = console if console.is_terminal else Console(width=100, highlight=False)
    out.print(plan_table(config))
    if limit is None:
        return 0
    flags, hopeless = fit_notes(config, limit)
    if hopeless:
        raise ValueError(f"memory: got {memory}, which is too little: {'; '.join(hopeless)}")
    out.print(f"\nEvery stage fits in {memory}." if not flags else f"\nFor every stage to fit in {memory}, cheapest first:")
    for line in flags:
        out.print(f"  {line}", soft_wrap=True)
    if config.workers > 1:
        out.print(f"{memory} is for one stage; {config.workers} run side by side. With --workers=1 they run one by one.")
    return 0


def prepare(output: str, data: DataConfig, model: ModelConfig, seed: int = 0) -> int:
    """Tokenise and split the data into OUTPUT, beside the model that it is for.

    Args:
        output: folder to make; the other commands take it as DATA.
        data: what is retained and what is forgotten.
        model: an architecture to initialise, or the folder of a checkpoint, whose tokenizer is then used.
        seed: of everything that is drawn.
    """
    from undo_core.pipeline.graph import prepare_stage

    stage = prepare_stage(data, model, seed)
    return _build(Path(output), "prepare", stage.settings, {})


def unlearn(model: str, output: str, data: str, config: UnlearnConfig = UnlearnConfig()) -> int:
    """Suppress the forget rows' capability in the checkpoint MODEL and write the result to OUTPUT.

    Args:
        model: Hugging Face checkpoint folder.
        output: folder to make.
        data: folder made by ``undo prepare``.
        config: method and training.
    """
    return _build(Path(output), "unlearn", config.settings(), {"prepared": data, "model": model})


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
    from undo_core.noise_checkpoint import describe_replay, replay_checkpoint

    rules = list(rules) if layers is None else [*rules, outside(layers)]
    law_of, asked = {"law": law, "seed": seed, "std": std}, [dataclasses.asdict(rule) for rule in rules]
    if replay is not None:
        _checkpoint("model", Path(model))
        if output == "-":
            for name, drawn in replay_checkpoint(Path(model), replay, rules=rules, **law_of):
                console.print(f"{name}  {describe_replay(drawn)}")
            return 0
        return _build(Path(output), "replay", {"pattern": replay, "rules": asked, **law_of}, {"model": model})
    Policy(alpha, beta, law, std, tuple(rules))
    changes = {"rules": asked, "parts": parts, "stochastic_rounding": stochastic_rounding}
    _build(Path(output), "noise", {"alpha": alpha, "beta": beta, **law_of, **changes}, {"model": model})
    _noise_table(Path(output))
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
    from undo_core.files import read_json
    from undo_core.pipeline.store import MANIFEST

    if (strength is None) == (alpha is None):
        raise ValueError(f"strength: got {strength} with alpha {alpha}, wanted one of the two")
    check_arguments(operator, strength or 0.0, seed)
    selection(layers)
    settings: dict[str, Any] = {"operator": operator, "seed": seed, "layers": layers, "parts": parts}
    if alpha is None:
        settings["strength"] = strength
    else:
        Policy(alpha, beta)
        settings["like"] = {"alpha": alpha, "beta": beta, "seed": seed}
    _build(Path(output), "damage", settings, {"model": model})
    facts = read_json(Path(output) / MANIFEST)
    wanted = "" if facts["wanted"] is None else f", the noise's {facts['wanted']:.4f}"
    console.print(f"strength {facts['strength']:.6g}: distance {facts['distance']:.4f}{wanted}")
    _print_left(facts)
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
    config = TeacherConfig("cached", dtype=dtype) if topk is None else TeacherConfig("topk", dtype=dtype, k=topk)
    settings = {"kind": config.kind, **({"dtype": dtype} if topk is None else {"k": topk}), "batch_size": batch_size}
    if streamed:
        settings["streamed"] = True
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    return _build(Path(output), "cache", settings, {"prepared": data, "teacher": teacher})


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
    from undo_core.files import read_json
    from undo_core.teacher_cache import FACTS

    inputs = {"prepared": data, "teacher": teacher, "student": student}
    settings: dict[str, Any] = {"train": dataclasses.asdict(train), "recover": recover}
    if hidden_weight:
        settings["hidden"] = {"hidden_weight": hidden_weight, "hidden_layers": hidden_layers}
    if vocab_size is not None:
        settings["vocab_size"] = vocab_size
    if cache is not None:
        if streamed:
            raise ValueError("streamed: got true with cache, wanted one of the two")
        if not (Path(cache) / FACTS).is_file():
            raise FileNotFoundError(f"cache: got {cache}, which has no {FACTS}; wanted a folder made by `undo cache`")
        made = read_json(Path(cache) / FACTS)["identity"]
        settings["teacher"] = {name: made[name] for name in ("kind", "dtype", "k", "vocab_size") if name in made}
        inputs["cache"] = cache
    elif streamed:
        settings["teacher"] = {"kind": "streamed"}
    return _build(Path(output), "distill", settings, inputs)


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
    from undo_core.data.rows import Rows
    from undo_core.files import read_json, write_json
    from undo_core.pipeline.functions import split_path
    from undo_core.pipeline.store import MANIFEST

    check_installed(config.kind)
    config = with_seed(config, 0)
    _prepared(Path(data))
    accuracy = Rows.load(split_path(Path(data), "test_forget")).answer_mask is not None

    def curve_of(trial: Trial) -> list[dict[str, Any]]:
        folder = Path(output) / trial.name
        _build(folder, *config.stage(trial), {"prepared": data, "model": model}, quiet=True)
        curve = read_json(folder / MANIFEST)["curve"]
        line = "  ".join(f"{point['step']}: {point['forget']['value']:.3f}" for point in curve)
        console.print(f"{trial.name.replace('-', ' ', 1)}   forget at step  {line}")
        return curve

    curves = explore(config, curve_of, accuracy)
    ordered = sorted(curves, key=lambda trial: (trial.rate or 0, trial.order))
    path = Path(output) / "curves.json"
    write_json(path, {trial.name.removeprefix("rate-"): curves[trial] for trial in ordered})
    console.print(str(path))
    return 0


def evaluate(
    model: str,
    data: str | None = None,
    multiple_choice: list[str] | str = [],  # noqa: B006
    examples: list[str] | str = [],  # noqa: B006
    shots: int = 0,
    description: str = DESCRIPTION,
    limit: float = 1.0,
    special_tokens: Literal["text", "parse"] = "text",
) -> int:
    """Print the checkpoint MODEL's metrics as JSON, with 95 % intervals.

    On the test rows of DATA: undo evaluate MODEL DATA. On multiple-choice questions, scored as lm-eval's WMDP and MMLU tasks do it:
    undo evaluate MODEL --multiple-choice wmdp.jsonl; 5-shot MMLU: --multiple-choice mmlu.parquet --examples dev.parquet --shots 5

    Args:
        model: Hugging Face checkpoint folder.
        data: folder made by ``undo prepare``.
        multiple_choice: JSONL or Parquet files, or hf://name[:config[:split]] (cais/mmlu:all), with question, choices, answer (an index)
            and subject.
        examples: sources of the same form with answered questions, of which the first ``shots`` of the subject are shown.
        shots: how many.
        description: text before everything; {subject} in it becomes the question's subject.
        limit: share of each subject's questions, the first ones; published for MMLU: 0.4.
        special_tokens: text: a control token that is written out in a question is text; parse: it becomes that token.
    """
    import json

    from undo_core.models import load_model, load_tokenizer
    from undo_core.multiple_choice import MultipleChoiceConfig
    from undo_core.multiple_choice import multiple_choice as score
    from undo_core.pipeline.functions import evaluate_folder

    if data is None and not multiple_choice:
        raise ValueError("data: got none and no multiple_choice, wanted one of the two")
    _checkpoint("model", Path(model))
    metrics: dict[str, Any] = {}
    if multiple_choice:
        files, shown = ([paths] if isinstance(paths, str) else paths for paths in (multiple_choice, examples))
        config = MultipleChoiceConfig(list(files), list(shown), shots, description, limit, special_tokens)
    if data is not None:
        _prepared(Path(data))
        metrics = evaluate_folder(Path(model), Path(data))
    if multiple_choice:
        metrics["multiple_choice"] = score(load_model(model), load_tokenizer(model), config)
    print(json.dumps(metrics, indent=1))
    return 0


def report(paths: list[str], output: str | None = None, title: str = "UNDO") -> int:
    """Write figures, tables and pages from the results of one run, of its seeds, or of many runs.

    Runs that differ in nothing but their seed get report.html; any runs get comparison.html, points.csv (every plotted value with the
    folder that it is from) and methods.md, .tex and .csv.

    Args:
        paths: results-seedN.json files, folders of runs, or folders of sweeps.
        output: folder to make; None for the folder ``report`` in the one folder that is given.
        title: of the pages.
    """
    from undo_core.report import terminal_table, write_report
    from undo_core.report.compare import comparison_table, load, write_comparison

    loaded = load([Path(path) for path in paths])
    if output is None:
        if len(paths) > 1 or not Path(paths[0]).is_dir():
            raise ValueError(
                f"output: got none with {', '.join(paths)}, wanted a folder, as there is not one folder of results"
            )
        output = str(Path(paths[0]) / "report")
    if len({folder for folder, _ in loaded}) == 1:
        results = [values for _, values in loaded]
        page = write_report(results, Path(output), title)
        console.print(terminal_table(results))
        console.print(str(page))
    page = write_comparison(loaded, Path(output), title)
    console.print(comparison_table(loaded))
    console.print(str(page))
    return 0


def doctor() -> int:
    """Print versions, devices and backends, and whether each kernel works."""
    from undo_core.doctor import run_doctor

    return run_doctor()


COMMANDS: dict[str, Callable[..., int]] = {
    function.__name__: function
    for function in (prepare, unlearn, noise, damage, cache, distill, relearn, evaluate, report, doctor)
}


def _noise_table(folder: Path) -> None:
    """What the noise did, a line for the tensors whose names differ in numbers alone; the manifest has each."""
    from rich.table import Table

    from undo_core.files import read_json
    from undo_core.noise import TensorNoise, by_kind
    from undo_core.pipeline.store import MANIFEST

    facts = read_json(folder / MANIFEST)
    tensors = {name: TensorNoise(**norms) for name, norms in facts["tensors"].items()}
    table = Table(box=None, pad_edge=False)
    for heading in ("parameters", "n", "before", "after", "shrink", "noise"):
        table.add_column(heading, justify="left" if heading == "parameters" else "right", overflow="fold")
    for kind, (count, total) in by_kind(tensors).items():
        shares = (f"{share:.1%}" for share in (total.shrink, total.noise))
        table.add_row(kind, str(count), f"{total.before:.4g}", f"{total.after:.4g}", *shares)
    console.print("Frobenius norms before and after; shares of shrinkage and of noise in the change")
    console.print(table)
    _print_left(facts)


def _print_left(facts: Mapping[str, Any]) -> None:
    """What the damage left as it was; the manifest has each name."""
    from undo_core.parameters import Left, summary

    if facts["left"]:
        console.print(f"left as they were: {summary({name: Left(**one) for name, one in facts['left'].items()})}")


def _build(output: Path, kind: str, settings: dict[str, Any], inputs: Mapping[str, str], quiet: bool = False) -> int:
    """Run one stage function from folders to ``output``; what is there already and was made alike is kept."""
    from undo_core.files import hash_file, read_json
    from undo_core.pipeline.functions import FUNCTIONS
    from undo_core.pipeline.store import FORMAT, MANIFEST, build_folder

    folders = {name: Path(folder) for name, folder in inputs.items()}
    for name, folder in folders.items():
        if name != "cache":
            _prepared(folder) if name == "prepared" else _checkpoint(name, folder)
    sources = {
        name: {path.relative_to(folder).as_posix(): hash_file(path) for path in _content(name, folder)}
        for name, folder in folders.items()
    }
    description = {"format": FORMAT, "kind": kind, "settings": settings, "sources": sources}
    if output.exists():
        manifest = output / MANIFEST
        if manifest.exists() and {key: read_json(manifest).get(key) for key in description} == description:
            if not quiet:
                console.print(f"{output}: already there, made from the same inputs and settings")
            return 0
        raise FileExistsError(f"output: got {output}, which exists and was made otherwise; wanted a new folder")
    build_folder(output, FUNCTIONS[kind], settings, folders, kind, description)
    if not quiet:
        console.print(str(output))
    return 0


def _content(name: str, folder: Path) -> list[Path]:
    """The files of an input folder that decide what is made from it."""
    from undo_core.checkpoint_files import CONFIG, weight_files
    from undo_core.pipeline.graph import TOKENIZER_FILES

    if name == "cache":  # its facts hold the hashes of what it was made from; its own bytes can be too many to read
        return [folder / "cache.json"]
    checkpoint = [folder / CONFIG, *weight_files(folder)] if (folder / CONFIG).is_file() else []
    found = {*checkpoint, *(folder / "data").glob("*.safetensors")}
    return sorted(found.union(*(folder.glob(pattern) for pattern in TOKENIZER_FILES)))


def _checkpoint(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{name}: got {folder}, which has no config.json; wanted a Hugging Face checkpoint folder")


def _prepared(folder: Path) -> None:
    if not (folder / "data").is_dir():
        raise FileNotFoundError(f"data: got {folder}, which has no data/; wanted a folder made by `undo prepare`")
