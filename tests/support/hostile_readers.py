"""The entry points that read files, each with a valid file to mutate."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from hostile import Reader
from safetensors.torch import save_file
from small_results import attack as attacked
from small_results import measure, search
from sweep_results import results
from tiny_run import RUN
from transformers import AutoConfig, AutoModelForCausalLM

from undo_core.attacks.config import AttackConfig
from undo_core.attacks.slowdown import slowdown_entry
from undo_core.checkpoints.files import MappedFile, checkpoint_skeleton, read_header, stored_dtype
from undo_core.checkpoints.parameters import CheckpointParameters
from undo_core.cli.folders import check_prepared, print_noise
from undo_core.cli.parser import as_run_config, command_parser, command_values, parser_arguments
from undo_core.cli.results import report
from undo_core.data.encoding import encoded
from undo_core.data.questions import MultipleChoiceConfig, posed
from undo_core.data.reading import read_documents, read_records
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.distillation.cache import FACTS, CachedTeacher, cache_teacher
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io import locks
from undo_core.models import load_model, load_tokenizer
from undo_core.models.folder import CONFIG, INDEX, SINGLE, read_configuration, weight_files
from undo_core.pipeline import stages
from undo_core.pipeline.attacked_model import trial_curve
from undo_core.pipeline.config_files import read_settings
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.run import metric_of, stage_summary
from undo_core.pipeline.stage import Folder
from undo_core.pipeline.stages.gate import KEPT, kept_sequences
from undo_core.pipeline.store import OneFolder, Store, provenance
from undo_core.pipeline.sweep_config import SweepConfig, expand
from undo_core.report import derive, markdown_tables
from undo_core.report.compare import comparison_table, load
from undo_core.report.defences import known_defences, merged, write_heatmap
from undo_core.training import TrainConfig, TrainResult
from undo_core.training.kept import KeptEvaluations
from undo_core.training.log import StageLog
from undo_core.training.optimizers import Updater
from undo_core.training.training_state import CheckpointWriter, find_training_state, load_training_state

MODEL = {
    **{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"vocab_size": 32, "max_position_embeddings": 16, "tie_word_embeddings": False},
}
QUESTION = {"question": "Which?", "choices": ["this", "that"], "answer": 1, "subject": "all"}


def checkpoint(folder: Path, sharded: bool = False) -> Path:
    """Writes a checkpoint of a thousand parameters with a tokenizer, in one weight file or in two."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODEL))
    model.save_pretrained(folder)
    character_tokenizer("ab c").save_pretrained(folder)
    if sharded:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        places = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
        for file in set(places.values()):
            save_file(
                {name: tensor for name, tensor in tensors.items() if places[name] == file}, folder / file, {"format": "pt"}
            )
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


def readers(root: Path) -> list[Reader]:
    """Writes every file under ``root``, each in a folder of its own, and returns the entry points that read them."""
    return [*_checkpoints(root), *_data(root), *_settings(root), *_run_folder(root), *_results(root)]


def _checkpoints(root: Path) -> list[Reader]:
    plain, sharded = checkpoint(root / "plain"), checkpoint(root / "sharded", sharded=True)

    def header() -> None:
        read_header(plain / SINGLE)
        mapped = MappedFile(plain / SINGLE, read_only=True)
        for name in list(mapped.entries):
            mapped.tensor(name).sum()

    def index() -> None:
        for path in weight_files(sharded):
            assert path.resolve().parent == sharded.resolve()

    def parameters() -> None:
        stored_dtype(plain)
        model = checkpoint_skeleton(plain)
        for _ in CheckpointParameters(plain, model, dict(model.named_parameters())).read("", progress=False):
            pass

    def tokens() -> None:
        encoded(load_tokenizer(plain), ["a b c", "c"])

    names, many = (str(plain), "model.config"), (str(sharded), "model-0")
    return [
        Reader("safetensors header", plain / SINGLE, header, "safetensors", 60, 26_000, (SINGLE,)),
        Reader("safetensors, loaded", plain / SINGLE, lambda: load_model(plain), "safetensors", 3, 400),
        Reader("safetensors, read by groups", plain / SINGLE, parameters, "safetensors", 4, 2000),
        Reader("index of weight files", sharded / INDEX, index, "json", 60, 12_000, (str(sharded),)),
        Reader("index, loaded", sharded / INDEX, lambda: load_model(sharded), "json", 3, 300, many),
        Reader("config.json", plain / CONFIG, lambda: read_configuration(plain), "json", 30, 5000, names),
        Reader("config.json, loaded", plain / CONFIG, lambda: load_model(plain), "json", 4, 500),
        Reader("tokenizer.json", plain / "tokenizer.json", tokens, "json", 8, 1500, (str(plain), "text:", "tokenizer")),
        Reader(
            "tokenizer_config.json",
            plain / "tokenizer_config.json",
            tokens,
            "json",
            8,
            1500,
            (str(plain), "text:", "tokenizer"),
        ),
    ]


def _data(root: Path) -> list[Reader]:
    import pyarrow
    import pyarrow.parquet

    folder = root / "data"
    folder.mkdir()
    text, lines, table, asked = (folder / name for name in ("a.txt", "a.jsonl", "a.parquet", "q.jsonl"))
    asked_table = folder / "q.parquet"
    text.write_text("one document\nanother\nthe third, with ünïcode\n", encoding="utf-8")
    lines.write_text("".join(json.dumps({"text": f"document {number}", "id": number}) + "\n" for number in range(4)))
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"document {n}" for n in range(40)], "id": list(range(40))}), table)
    asked.write_text("".join(json.dumps({**QUESTION, "question": f"{number}?"}) + "\n" for number in range(4)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([QUESTION] * 20), asked_table)

    def split() -> None:
        check_prepared(root / "prepared")
        sequences = load_split(root / "prepared", "test_forget")
        sequences.digest()
        sequences.batch(3, 4, 0)
        Sequences.joined([sequences, sequences]).position_ids()

    rows = [[1, 4, 5, 6, 1, 0], [1, 5, 5, 1, 0, 0]]
    answers = torch.tensor([[False, False, True, False, False, False]] * 2)
    starts = torch.tensor([[True] + [False] * 5] * 2)
    prepared = root / "prepared" / "data" / "test_forget.safetensors"
    prepared.parent.mkdir(parents=True)
    Sequences(
        torch.tensor(rows, dtype=torch.int32),
        0,
        answers,
        torch.tensor([0, 1], dtype=torch.int16),
        ("+", "-"),
        None,
        None,
        starts,
    ).save(prepared)
    question = ("q.jsonl", "q.parquet", "shots", "description")
    return [
        Reader("text", text, lambda: list(read_documents([str(text)])), "bytes", 40, 8000, ("a.txt",)),
        Reader("JSONL", lines, lambda: list(read_documents([str(lines)])), "jsonl", 40, 10_000, ("a.jsonl",)),
        Reader("Parquet, text", table, lambda: list(read_documents([str(table)])), "bytes", 30, 6000, ("a.parquet",)),
        Reader(
            "Parquet, records",
            asked_table,
            lambda: list(read_records(str(asked_table), "data", split="test")),
            "bytes",
            10,
            2000,
            question,
        ),
        Reader("questions", asked, lambda: posed(MultipleChoiceConfig([str(asked)])), "jsonl", 40, 8000, question),
        Reader(
            "questions in Parquet",
            asked_table,
            lambda: posed(MultipleChoiceConfig([str(asked_table)])),
            "bytes",
            10,
            2000,
            question,
        ),
        Reader("prepared sequences", prepared, split, "safetensors", 20, 4000, ("test_forget.safetensors",)),
    ]


def _settings(root: Path) -> list[Reader]:
    folder = root / "settings"
    folder.mkdir()
    plain, run, swept, base = (folder / name for name in ("plain.yaml", "run.yaml", "sweep.yaml", "base.yaml"))
    for path in (plain, run, base):
        path.write_text(yaml.safe_dump(RUN))
    grid = {"noise.alphas": [[0.2], [0.4]], "seed": [0, 1]}
    sweep = {
        "name": "s",
        "base": str(base),
        "output": str(folder / "out"),
        "grid": grid,
        "runs": [{"name": "a", "noise.beta": 0.1}],
    }
    swept.write_text(yaml.safe_dump({**sweep, "overrides": {"relearn.batch_size": 2}, "overlays": []}))

    def parsed(command: str, path: Path) -> None:
        parser = command_parser(command)
        values = command_values(parser, parser.parse_args(parser_arguments([command, str(path)])))
        if command == "run":
            as_run_config(values)
            return
        sweep = SweepConfig(**{name: value for name, value in vars(values).items() if name not in ("config", "dry_run")})
        for config in expand(sweep):
            assert Path(config.output).resolve().parent == (Path(sweep.output) / "runs").resolve(), config.output

    return [
        Reader("YAML settings", plain, lambda: read_settings(plain), "yaml", 20, 4000, ("plain.yaml",)),
        Reader("run configuration", run, lambda: parsed("run", run), "yaml", 4, 300),
        Reader("sweep", swept, lambda: parsed("sweep", swept), "yaml", 4, 300),
    ]


def _run_folder(root: Path) -> list[Reader]:
    model = load_model(root / "plain")
    sequences = Sequences(torch.randint(2, 6, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32), 0)
    cache, unfinished, kept, gate, state = (root / name for name in ("cache", "unfinished", "kept", "gate", "state"))
    settings = TeacherConfig("topk", k=3, batch_size=4)
    cache_teacher(model, sequences, cache, settings, progress=False)
    shutil.copytree(cache, unfinished)
    facts = json.loads((unfinished / FACTS).read_text())
    (unfinished / FACTS).unlink()
    (unfinished / "progress.json").write_text(json.dumps({"identity": facts["identity"], "bounds": [0, 6], "rows": 0}))

    def cached() -> None:
        teacher = CachedTeacher.open(cache, config=TeacherConfig("topk", k=3))
        teacher.check(sequences)
        teacher.targets(SimpleNamespace(index=torch.tensor([0, 5]), input_ids=sequences.input_ids[[0, 5]]))

    def continued() -> None:
        cache_teacher(model, sequences, unfinished, settings, progress=False)
        if (unfinished / FACTS).exists():
            (unfinished / FACTS).unlink()

    held = root / "held"
    held.mkdir()
    claim = held / ".x.lock.1"
    claim.write_text(json.dumps({**vars(locks.Owner.new()), "pid": 2**22 - 3}))

    def lock() -> None:
        kept_lease, locks.LEASE = locks.LEASE, 0.0
        try:
            with locks.locked(held / ".x.lock", ""):
                pass
        finally:
            locks.LEASE = kept_lease
            for path in held.iterdir():
                if path != claim:
                    path.unlink()

    small = torch.nn.Linear(2, 2)
    updater = Updater(small, list(small.parameters()), TrainConfig(steps=1))
    with CheckpointWriter(state, small, updater) as writer:
        writer.write(3, {"made_by": {"seed": 0}, "result": {}})
    written = state / "step-3"

    def restored() -> None:
        load_training_state(written, small, updater)

    log = root / "log" / "log.jsonl"
    log.parent.mkdir()
    log.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(5)))
    evaluations = KeptEvaluations(lambda metrics: "x" in metrics, lambda: False, small, kept, 1)
    evaluations.keep(dataclasses.asdict(TrainResult(steps=1)), {"x": 0.0})

    def first() -> None:
        try:
            evaluations.first()
        finally:
            kept.mkdir(exist_ok=True)  # it is removed if no evaluation satisfies the rule

    gate.mkdir()
    save_file({"kept": torch.tensor([True, False]), "weight": torch.zeros(4), "bias": torch.zeros(1)}, gate / KEPT)
    shard = next(cache.glob("*.safetensors"))
    return [
        Reader("teacher's cache", cache / FACTS, cached, "json", 20, 5000, ("cache", "k:", "vocab_size")),
        Reader("shard of a cache", shard, cached, "safetensors", 15, 4000, (str(cache), "text:")),
        Reader("unfinished cache", unfinished / "progress.json", continued, "json", 4, 300, (str(unfinished),)),
        *_manifests(root),
        Reader("lock", claim, lock, "json", 20, 3000, ()),
        Reader(
            "training state",
            written / "state.json",
            lambda: find_training_state(state, {"seed": 0}),
            "json",
            30,
            5000,
            (str(root),),
        ),
        Reader("training state, weights", written / "model.safetensors", restored, "safetensors", 15, 3000, (str(written),)),
        Reader(
            "training state, optimizer", written / "optimizer.safetensors", restored, "safetensors", 15, 3000, (str(written),)
        ),
        Reader("log", log, lambda: StageLog(log.parent, 3), "jsonl", 20, 3000, ("log.jsonl",)),
        Reader("kept evaluation", next(kept.iterdir()), first, "safetensors", 15, 2000, (str(kept),)),
        Reader("gate", gate / KEPT, lambda: kept_sequences(gate, 2), "safetensors", 15, 2000, (KEPT,)),
    ]


def _manifests(root: Path) -> list[Reader]:
    """The manifest of each kind of stage of which a run reads more than all manifests have."""
    score = {"value": 1.0, "low": 0.9, "high": 1.1, "n": 4}
    split = {"rows": 4, "length": 8, "tokens": 32}
    left = {"a": {"reason": "frozen", "elements": 3, "share": 0.1}}
    norms = dict.fromkeys(("before", "after", "change", "shrink", "noise"), 0.5)
    attack = AttackConfig(rates=[1e-3], evaluate_at=[0, 2], headline_step=2)
    read_so = SimpleNamespace(data=SimpleNamespace(metric="loss"), relearn=attack, retain_margin=None)
    every = {
        **{"format": 5, "settings": {}, "sources": {}, "key": "0123456789ab", "outputs": {"model.safetensors": "0"}},
        **{"seconds": 1.0, "peak_bytes": 1, "steps": 2, "tokens": 8, "flops": 1.0, "limit_reached": False, "stopped": None},
        **{"history": [{"step": 2, "loss": 1.0, "retain": 2.0, "forget": 3.0}], "retain_target": None, "parameters": 9},
        **{"splits": {"train_retain": split, "test_retain": split, "test_forget": split}},
        "curve": [{"step": step, "forget": score, "retain": score} for step in (0, 2)],
    }

    def of_kind(kind: Any, own: dict[str, Any], use: Callable[[dict[str, Any]], Any], full: int = 500) -> Reader:
        folder = root / f"stages of {kind.kind}" / f"{kind.kind}-0123456789ab"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({**every, "kind": kind.kind, **own}))
        called = {"name": folder.name, "kind": kind.kind, "entries": kind.entries, "title": kind.kind}
        stage = SimpleNamespace(settings={}, key="0123456789ab", inputs={}, **called)

        def read() -> None:
            store = Store(folder.parent)
            if store.done(stage):
                facts = store.manifest(stage)
                stage_summary(stage, facts)
                use(facts)
                metric_of(store, read_so, SimpleNamespace(prepared=stage, models=[SimpleNamespace(stage=stage)]))
                provenance(folder)
                Folder(folder).content  # noqa: B018
                OneFolder(folder).done(stage)

        return Reader(f"manifest, {kind.kind}", folder / "manifest.json", read, "json", 5, full, (str(folder),))

    tensors = {"w": {name: norms[name] for name in ("before", "change")}}
    damage = {"tensors": tensors, "left": left, "strength": 1.0, "distance": 0.5, "wanted": None}
    return [
        of_kind(stages.Relearn, {}, lambda facts: trial_curve(attack, facts), 2000),
        of_kind(stages.Noise, {"tensors": {"w": norms}, "left": left, "alpha": 0.5, "distance": 0.5}, _of_noise),
        of_kind(stages.Damage, damage, lambda facts: stages.Damage.results(SimpleNamespace(operator="prune"), facts)),
        of_kind(stages.Erase, {"erased": [{"token": "a", "id": 5}]}, lambda facts: stages.Erase.results(None, facts)),
        of_kind(
            stages.Search,
            {"trials": search((10, 1e6))["trials"], "best": 0},
            lambda facts: stages.Search.results(None, facts),
        ),
        of_kind(
            stages.Measure,
            {"points": [{"at": 0, "value": 1.0}]},
            lambda facts: [10 * point["at"] + (point["value"] or 0) for point in facts["points"]],
        ),
    ]


def _of_noise(facts: dict[str, Any]) -> None:
    stages.Noise.results(None, facts)
    print_noise(facts)


def _everything() -> dict[str, Any]:
    """Results with every entry that a report reads."""
    found = results("a", seed=1)
    found["metric"]["retain_margin"] = 0.1
    found["alpha_search"] = {"target": 0.5, "tried": [0.2, 0.4, 0.6, 0.8], "configured": 2, "ended": "it was found"}
    for number, entry in enumerate(found["models"]):
        entry["measures"] = {"cka": measure(0.1 * number)}
        for curve in entry["attack"]["curves"] if entry["attack"] else ():
            curve["flops"] = [1e6 * step for step in entry["attack"]["steps"]]
        if entry["attack"]:
            still = {**attacked([0.1], [0.2]), "steps": [0], "headline_step": 0, "kind": "lens"}
            for curve, strength in zip(still["curves"], (0.5, 1.0), strict=True):
                curve |= {"rate": None, "setting": f"strength-{strength}", "point": {"strength": strength}}
                curve["retain"] = curve["retain"][:1]
            entry["attacks"] = {"found": search((10, 1e6), (70, 3e6)), "lens": still}
    return found


def _results(root: Path) -> list[Reader]:
    run, attacked_folder = root / "results", root / "attacked"
    run.mkdir()
    (run / "results-seed1.json").write_text(json.dumps(_everything()))
    trial = attacked_folder / "defences" / "theirs" / "trial_0"
    trial.mkdir(parents=True)
    entry = _everything()
    model = {
        **entry["models"][1],
        "kind": "defence",
        "name": "theirs",
        "training": None,
        "checkpoint": {"path": "x", "content": "0"},
    }
    del entry["alpha_search"]
    config = {
        "relearn": {"kind": "finetune", "mix": {"forget": 1.0}},
        "attacks": {"found": {"kind": "search"}, "lens": {"kind": "lens"}},
    }
    (trial / "defence.json").write_text(json.dumps({**entry, "command": "", "config": config, "models": [model]}))

    def tables() -> None:
        loaded = load([run])
        comparison_table(loaded)
        markdown_tables(derive([values for _, values in loaded], ""))

    def drawn() -> None:
        report([str(run)], output=str(run / "report"))

    def defences() -> None:
        seeds = merged(known_defences(attacked_folder))
        for found in seeds:
            slowdown_entry(found)
            write_heatmap(trial / "report", found)
        markdown_tables(derive(seeds, ""))

    return [
        Reader("results", run / "results-seed1.json", tables, "json", 6, 1500, ("results", str(run))),
        Reader("results, drawn", run / "results-seed1.json", drawn, "json", 1, 60, ("results", str(run))),
        Reader("results of an attack", trial / "defence.json", defences, "json", 15, 3000, ("results", str(trial))),
    ]
