"""The stages as functions from folders to a folder. Each reads its settings as JSON values, so that they can be a key."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from undo_core.attacks import few_shot, quantise_
from undo_core.attacks.config import attack_config
from undo_core.checkpoint_files import stored_dtype
from undo_core.damage import damage_checkpoint
from undo_core.data.encoding import encoded, surroundings
from undo_core.data.limits import Limits
from undo_core.data.rows import Rows
from undo_core.data.splits import TRAIN_SPLITS, distilled, heldout_text, make_splits
from undo_core.distillation import distill
from undo_core.evaluation import evaluate
from undo_core.files import read_json
from undo_core.gate import GateConfig, fit_gate, labelled
from undo_core.models import (
    build_model,
    configuration,
    forward_flops,
    head_flops,
    load_model,
    load_tokenizer,
    positions_of,
    tokens_of,
    vocabulary_of,
)
from undo_core.models import initialise as initialise_model
from undo_core.noise_checkpoint import noise_checkpoint, write_replay
from undo_core.ops.noise_rules import NoiseRule
from undo_core.pipeline.meta import Predictor
from undo_core.pipeline.store import MANIFEST, StageFunction, Work
from undo_core.relearning import attack
from undo_core.streaming import stream_model
from undo_core.teacher import ModelTeacher, TeacherConfig
from undo_core.teacher_cache import CachedTeacher, cache_teacher
from undo_core.training import TrainConfig, TrainResult, rows_source, train
from undo_core.training.losses import cross_entropy
from undo_core.training.precision import Precision, weight_dtype
from undo_core.training.progress import console
from undo_core.unlearning import unlearn, unlearn_config, unlearn_flops

Evaluate = Callable[[PreTrainedModel], dict[str, float]]


def prepare(work: Work) -> dict[str, Any]:
    """Draw, tokenise and split the data; build the tokenizer and the model at its initialisation."""
    settings = work.settings["model"]
    path, expected = settings["path"], configuration(settings)
    tokenizer, splits, cut = make_splits(work.settings["data"], positions_of(expected))
    limits = Limits(expected.get_text_config().vocab_size if path else len(tokenizer), positions_of(expected))
    for name, rows in splits.items():
        limits.check_rows(rows, f"data ({name})")
    model = load_model(path, stored_dtype(Path(path))) if path else build_model(settings["config"], tokenizer, settings["seed"])
    (work.output / "data").mkdir()
    for name, rows in splits.items():
        rows.save(work.output / "data" / f"{name}.safetensors")
    _save(model, tokenizer, work.output)
    facts = {name: {"rows": len(rows), "length": rows.length, "tokens": rows.tokens()} for name, rows in splits.items()}
    for name, count in cut.items():
        facts[name]["truncated"] = count
        if count:
            console.print(
                f"{work.title}: {count} of {len(splits[name])} questions of {name} are cut at their beginning to fit the model"
            )
    return {"parameters": sum(p.numel() for p in model.parameters()), "splits": facts}


def initialise(work: Work) -> dict[str, Any]:
    """A model of the same architecture at a fresh initialisation from another seed: the random student."""
    source = work.inputs["model"]
    model = initialise_model(AutoConfig.from_pretrained(source, trust_remote_code=False), work.settings["seed"])
    _save(model, load_tokenizer(source), work.output)
    return {}


def pretrain(work: Work) -> dict[str, Any]:
    """Train from the prepared initialisation on everything, or on the retain rows alone (data filtering)."""
    settings = work.settings
    config = TrainConfig(**settings["train"])
    model, data = _load(work.inputs["prepared"], config.precision), work.inputs["prepared"]
    train_rows = _train_rows(data, settings["splits"])
    metrics = _validation(data, ("retain", "forget"))
    stop = None
    facts: dict[str, Any] = {}
    if settings.get("recover") is not None:
        reached = _retain(load_model(work.inputs["target"]), data)
        stop, facts["retain_target"] = _recovered(reached, data, settings["recover"])
        metrics = _validation(data, ("retain",))
    elif settings.get("stop_retain") is not None:
        wanted = {name: settings[f"stop_{name}"] for name in ("retain", "forget")}

        def stop(values: dict[str, float]) -> bool:
            return all(values[name] >= value for name, value in wanted.items() if value is not None)

    result = train(
        model,
        lambda model, batches, counted: cross_entropy(model, batches["text"], counted["text"]),
        {"text": rows_source(train_rows, config.batch_size, config.seed or 0)},
        config,
        evaluate=metrics,
        stop=stop,
        folder=work.scratch,
        title=work.title,
    )
    _save(model, load_tokenizer(data), work.output)
    flops = 3 * forward_flops(model, train_rows.length) * result.positions["text"]
    return {**facts, **_facts(result, flops)}


def unlearn_stage(work: Work) -> dict[str, Any]:
    """Suppress the forget rows' capability in the model."""
    settings = work.settings
    config = unlearn_config(settings)
    tokens = tokens_of(load_tokenizer(work.inputs["prepared"]))
    model, data = _load(work.inputs["model"], config.train.precision), work.inputs["prepared"]
    if config.vocab_size is None and tokens < vocabulary_of(model):
        config = dataclasses.replace(config, vocab_size=tokens)
    forget, retain = _train_rows(data, ["forget"]), _train_rows(data, ["retain"])
    if config.forget_rows is not None:
        if config.forget_rows > len(forget):
            raise ValueError(
                f"forget_rows: got {config.forget_rows}, wanted at most the {len(forget)} rows to forget that there are"
            )
        forget = forget.take(slice(config.forget_rows))
    metrics = _validation(data, ("retain", "forget"))
    result = unlearn(
        model, forget=forget, retain=retain, config=config, evaluate=metrics, folder=work.scratch, title=work.title
    )
    _save(model, load_tokenizer(data), work.output)
    costs = unlearn_flops(model, config, forget.length)
    flops = sum(costs[name] * count for name, count in result.positions.items())
    read = {name: result.tokens.get(name, 0) for name in ("forget", "retain")}
    drawn = result.steps * config.train.batch_size
    seeds = {"forget": config.train.seed or 0, "retain": (config.train.seed or 0) + 1}
    distinct = {
        name: rows.take(rows.order(0, min(drawn, len(rows)), seeds[name])).tokens() if read[name] else 0
        for name, rows in {"forget": forget, "retain": retain}.items()
    }
    labelled = {f"labelled_{name}_tokens": count for name, count in read.items()}
    return {**labelled, "labelled_distinct_tokens": distinct, **_facts(result, flops)}


def noise(work: Work) -> dict[str, Any]:
    """Damage the model's parameters, from disk to disk."""
    settings = dict(work.settings)
    rules = [NoiseRule(**rule) for rule in settings.pop("rules", [])]
    report = noise_checkpoint(work.inputs["model"], work.output, rules=rules, title=work.title, **settings)
    return {"tensors": _as_dicts(report), "left": _as_dicts(report.left)}


def damage_stage(work: Work) -> dict[str, Any]:
    """Damage the model's matrices by another operator, from disk to disk."""
    settings = dict(work.settings)
    if settings.get("like") is not None:
        rules = [NoiseRule(**rule) for rule in settings["like"].get("rules", [])]
        settings["like"] = {**settings["like"], "rules": rules}
    facts = damage_checkpoint(work.inputs["model"], work.output, title=work.title, **settings)
    return {**facts, "tensors": _as_dicts(facts["tensors"]), "left": _as_dicts(facts["left"])}


def _as_dicts(named: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(facts) for name, facts in named.items()}


def replay(work: Work) -> dict[str, Any]:
    """N itself, for audit."""
    settings = dict(work.settings)
    rules = [NoiseRule(**rule) for rule in settings.pop("rules")]
    path = work.output / "noise.safetensors"
    return {"tensors": write_replay(work.inputs["model"], path, settings.pop("pattern"), rules=rules, **settings)}


def distill_stage(work: Work) -> dict[str, Any]:
    """Train the student to match the teacher, until it recovers the teacher's retain performance."""
    settings = work.settings
    config = TrainConfig(**settings["train"])
    data = work.inputs["prepared"]
    how = TeacherConfig(**settings.get("teacher", {}))
    student, text = _load(work.inputs["student"], config.precision), _distill_rows(data)
    if "gate" in work.inputs:
        text = text.take(load_file(work.inputs["gate"] / KEPT)["kept"])
    if "cache" in work.inputs:
        teacher = CachedTeacher.open(work.inputs["cache"], work.inputs["teacher"], how)
        reached = _cached_retain(work.inputs["cache"], data)
        passes = head_flops(student) if how.kind == "cached" else 0.0  # its trunk's are the cache's
    else:
        folder = work.inputs["teacher"]
        if how.kind == "streamed":
            model = stream_model(folder)
        else:  # as published, a student in 16 bits learns from a teacher in 16 bits
            model = load_model(folder, torch.float32 if config.precision == "float32" else stored_dtype(folder))
        teacher, reached, passes = ModelTeacher(model), None, forward_flops(model, text.length)
    size = settings.get("vocab_size")
    if size is None and teacher.vocabulary != vocabulary_of(student):
        size = _common_tokens(work, teacher.vocabulary, vocabulary_of(student))
    stop, facts = None, {}
    if settings["recover"] is not None:
        if "target" in work.inputs:
            reached = _retain(load_model(work.inputs["target"]), data)
        reached = _retain(teacher.model, data) if reached is None else reached
        stop, facts["retain_target"] = _recovered(reached, data, settings["recover"])
    metrics = _validation(data, ("retain",))
    result = distill(
        student,
        teacher,
        text,
        config,
        **settings.get("hidden", {}),
        vocab_size=size,
        evaluate=metrics,
        stop=stop,
        folder=work.scratch,
        title=work.title,
    )
    _save(student, load_tokenizer(data), work.output)
    flops = (forward_flops(student, text.length) * 3 + passes) * result.positions["text"]
    return {**facts, **_facts(result, flops)}


def _common_tokens(work: Work, teacher: int, student: int) -> int:
    """The smaller number of rows of two heads that are padded differently, where both models have one tokenizer.

    Raises:
        ValueError: they have not.
    """
    known, smaller = [_vocabulary(work.inputs[name]) for name in ("teacher", "student")], min(teacher, student)
    if known[0] is None or known[0] != known[1] or max(known[0].values()) >= smaller:
        folders = " and ".join(str(work.inputs[name]) for name in ("teacher", "student"))
        raise ValueError(
            f"student: got a vocabulary of {student}, wanted the teacher's {teacher}, or one tokenizer in both of {folders}, with at most "
            f"{smaller} tokens; they have none, different ones, or more tokens"
        )
    console.print(f"{work.title}: the teacher's head has {teacher} rows and the student's {student}; the first {smaller} count")
    return smaller


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Ids of a folder's tokenizer by token; None where it has no tokenizer that can be loaded."""
    try:
        return load_tokenizer(folder).get_vocab()
    except (OSError, ValueError):
        return None


def gate_stage(work: Work) -> dict[str, Any]:
    """Learn from a labelled sample which of the rows that students are distilled on are to be dropped."""
    settings, data = dict(work.settings), work.inputs["prepared"]
    config = GateConfig(**settings)
    # Whichever rows are labelled, forget and retain are drawn apart.
    seeds = {"forget": config.seed or 0, "retain": (config.seed or 0) + 1}
    known = {name: labelled(_train_rows(data, [name]), config.share, seed) for name, seed in seeds.items()}
    fitted = fit_gate(known["forget"], known["retain"], config)
    text = _distill_rows(data)
    kept = ~fitted.forget(text)
    if not kept.any():
        raise ValueError(f"controls.gate: got a classifier that drops all {len(text)} rows, wanted one that keeps some")
    save_file({"kept": kept, "weight": fitted.weight, "bias": fitted.bias}, work.output / KEPT)
    return {
        **{f"labelled_{name}_tokens": rows.tokens() for name, rows in known.items()},
        "labelled_rows": {name: len(rows) for name, rows in known.items()},
        "heldout": fitted.quality(*(_heldout_text(data, name) for name in ("forget", "retain"))),
        "kept_rows": int(kept.sum()),
        "rows": len(text),
    }


def cache_stage(work: Work) -> dict[str, Any]:
    """Run the teacher once over the rows that every student is distilled on."""
    settings = dict(work.settings)
    streamed = settings.pop("streamed", False)
    model, data = (stream_model if streamed else load_model)(work.inputs["teacher"]), work.inputs["prepared"]
    text, scored = _distill_rows(data), load_split(data, "valid_retain")
    scratch, config = work.scratch / "cache", TeacherConfig(**settings)
    cached = cache_teacher(model, text, scratch, config, check=_heldout_text(data, "retain"), title=work.title)
    for path in sorted(scratch.iterdir()):
        try:
            os.link(path, work.output / path.name)  # a second name: a kill before the folder is published loses nothing
        except OSError:  # a file system without hard links
            shutil.copyfile(path, work.output / path.name)
    flops = forward_flops(model, text.length) * text.input_ids.numel()
    return {**cached.facts, "flops": flops, "retain": _retain(model, data), "retain_rows": scored.digest()}


def relearn_stage(work: Work) -> dict[str, Any]:
    """Attack the model at one learning rate; the manifest holds the curve, on the test rows."""
    config, rate = attack_config(work.settings), work.settings["rate"]
    model, data = _load(work.inputs["model"], config.precision), work.inputs["prepared"]
    texts = {name: _train_rows(data, [name]) for name in config.rows()}
    tests = {name: load_split(data, f"test_{name}") for name in ("forget", "retain")}
    points: dict[int, dict[str, Any]] = {}

    def metrics(model: PreTrainedModel) -> dict[str, float]:
        scores = {name: evaluate(model, rows) for name, rows in tests.items()}
        return {f"{name}{suffix}": score[key] for name, score in scores.items() for suffix, key in _INTERVAL.items()}

    given = {"forget": None, **texts}
    result = attack(model, rate=rate, config=config, **given, evaluate=metrics, folder=work.scratch, title=work.title)
    for entry in result.history:
        points[int(entry["step"])] = {
            name: {key: entry[f"{name}{suffix}"] for suffix, key in _INTERVAL.items()} | {"n": len(rows)}
            for name, rows in tests.items()
        }
    _save(model, load_tokenizer(data), work.output)
    curve = [{"step": step, **point} for step, point in points.items()]
    passes = 2 if config.kind == "lora" else 3  # a frozen matrix needs no gradient of its own
    flops = sum(passes * forward_flops(model, rows.length) * result.positions[name] for name, rows in texts.items())
    return {"curve": curve, **_facts(result, flops)}


def probe_stage(work: Work) -> dict[str, Any]:
    """Evaluate the model under an attack that trains nothing; the manifest, which is all there is, holds one point of a curve."""
    settings, data = work.settings, work.inputs["prepared"]
    model = load_model(work.inputs["model"])
    tests = {name: load_split(data, f"test_{name}") for name in ("forget", "retain")}
    if settings["kind"] == "fewshot":
        examples, how = load_split(data, "valid_forget"), {"seed": settings["seed"], "positions": positions_of(model.config)}
        if examples.choices is not None:  # an answered question ends without its own end
            tokenizer = load_tokenizer(data)
            how |= {"between": encoded(tokenizer, ["\n\n"])[0], "lead": surroundings(tokenizer, "\n\n")[0]}
        prompted = {name: few_shot(rows, examples, settings["shots"], **how) for name, rows in tests.items()}
        facts = {"length": prompted["forget"][0].length}
        scores = {name: evaluate(model, rows, counted=counted) for name, (rows, counted) in prompted.items()}
    else:
        facts = {"quantised": quantise_(model, settings["bits"], settings.get("group_size", 1))}
        scores = {name: evaluate(model, rows) for name, rows in tests.items()}
    point = {name: {key: score[key] for key in ("value", "low", "high", "n")} for name, score in scores.items()}
    return {"curve": [{"step": 0, **point}], **facts}


def evaluate_folder(folder: Path, data: Path) -> dict[str, Any]:
    """Every test and held-out metric of the model in ``folder``."""
    model = load_model(folder)
    names = {
        "retain": "test_retain",
        "forget": "test_forget",
        "heldout_retain": "heldout_retain",
        "heldout_forget": "heldout_forget",
    }
    return {name: evaluate(model, load_split(data, split)) for name, split in names.items() if split_path(data, split).exists()}


def _predicted(function: StageFunction, kind: str, work: Work) -> dict[str, Any]:
    """The stage, with the peak that ``undo plan`` would predict in its manifest beside the measured one; None where it cannot."""
    data = work.inputs["prepared"]
    rows = load_split(data, TRAIN_SPLITS["retain"])
    scored = load_split(data, "valid_retain")
    source = next(work.inputs[name] for name in ("student", "model", "teacher", "prepared") if name in work.inputs)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    predict = Predictor(config, rows.length, **_scored(scored))
    try:
        predicted = predict(kind, work.settings, stored_dtype(source)).total
    except Exception as error:  # of the diagnostic: whether the stage can run is the stage's to say
        console.print(f"{work.title}: peak memory not predicted: {type(error).__name__}: {error}")
        predicted = None
    return {"predicted_bytes": predicted, **function(work)}


FUNCTIONS: dict[str, StageFunction] = {
    "prepare": prepare,
    "initialise": initialise,
    "pretrain": partial(_predicted, pretrain, "pretrain"),
    "unlearn": partial(_predicted, unlearn_stage, "unlearn"),
    "noise": noise,
    "replay": replay,
    "damage": damage_stage,
    "gate": gate_stage,
    "cache": partial(_predicted, cache_stage, "cache"),
    "distill": partial(_predicted, distill_stage, "distill"),
    "relearn": partial(_predicted, relearn_stage, "relearn"),
    "probe": partial(_predicted, probe_stage, "probe"),
}

KEPT = "gate.safetensors"
_INTERVAL = {"": "value", "_low": "low", "_high": "high"}


def split_path(data: Path, split: str) -> Path:
    """Where a prepared folder keeps a split."""
    return data / "data" / f"{split}.safetensors"


def load_split(data: Path, split: str) -> Rows:
    """A split of a prepared folder."""
    return Rows.load(split_path(data, split))


def _train_rows(data: Path, splits: list[str]) -> Rows:
    """The training rows of the named splits, one after the other; a batch mixes them in proportion to their sizes."""
    return Rows.joined([load_split(data, TRAIN_SPLITS[name]) for name in splits])


def _distill_rows(data: Path) -> Rows:
    return _train_rows(data, distilled(_splits(data)))


def _heldout_text(data: Path, name: str) -> Rows:
    return load_split(data, heldout_text(_splits(data), name))


def _splits(data: Path) -> set[str]:
    return {path.stem for path in (data / "data").glob("*.safetensors")}


def _scored(rows: Rows) -> dict[str, Any]:
    """What a prediction of memory has to know of rows that are evaluated."""
    asked = {} if rows.choices is None else {"choices": rows.choices.shape[1], "evaluated_length": rows.length}
    return {"answers": rows.answer_mask is not None, "evaluated": len(rows), **asked}


def _load(folder: Path, precision: Precision) -> PreTrainedModel:
    """A model to train, in 16 bits from the start where training would make it so; masters keep what a float32 folder has."""
    keeps = precision == "bfloat16-master" and stored_dtype(folder) != torch.bfloat16
    return load_model(folder, torch.float32 if keeps else weight_dtype(precision))


def _validation(data: Path, names: tuple[str, ...]) -> Evaluate:
    rows = {name: load_split(data, f"valid_{name}") for name in names}
    return lambda model: {name: evaluate(model, part)["value"] for name, part in rows.items()}


def _retain(model: PreTrainedModel, data: Path) -> float:
    return evaluate(model, load_split(data, "valid_retain"))["value"]


def _cached_retain(cache: Path, data: Path) -> float:
    """The teacher's retain performance, measured when the cache was made."""
    facts = read_json(cache / MANIFEST)
    if facts["retain_rows"] != load_split(data, "valid_retain").digest():
        raise ValueError(f"cache: got {cache}, made with other validation rows than {data} has; wanted those of the same data")
    return facts["retain"]


def _recovered(reached: float, data: Path, recover: float) -> tuple[Callable[[dict[str, float]], bool], float]:
    """The published stop rule (within 0.05 of the teacher's accuracy, or 5 % of its cross-entropy), and its target."""
    rows = load_split(data, "valid_retain")
    if rows.answer_mask is not None:
        target = reached - recover
        return lambda metrics: metrics["retain"] >= target, target
    target = reached * (1 + recover)
    return lambda metrics: metrics["retain"] <= target, target


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _facts(result: TrainResult, flops: float) -> dict[str, Any]:
    facts = dataclasses.asdict(result)
    facts["tokens_by_source"] = facts.pop("tokens")
    facts["positions_by_source"] = facts.pop("positions")
    facts["tokens"] = sum(result.tokens.values())
    facts["limit_reached"] = result.limit_reached
    facts["flops"] = flops
    return facts
