"""Files from strangers: none runs code, leaves its folder, takes memory without a limit, or ends in more than one line."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import sys
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError

pytest.importorskip("resource", reason="the address space can be limited on Unix only")
pytest.importorskip("pyarrow")

from hostile import Escaped, attack, limited, odd_places, watched
from hostile_readers import checkpoint, readers
from mutations import MODULE
from safetensors.torch import load_file, save_file
from sweep_results import results
from tiny_run import RUN
from tokenizer_kinds import tokenizer_of
from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from undo_core.attacks import AttackConfig
from undo_core.cli import main
from undo_core.cli.parser import parser_arguments
from undo_core.data.reading import read_documents
from undo_core.io.untrusted import inside
from undo_core.models import load_model, load_tokenizer
from undo_core.models.folder import CONFIG, INDEX, SINGLE, read_configuration
from undo_core.pipeline.config_files import parse_value, read_settings
from undo_core.pipeline.sweep_config import SweepConfig, expand
from undo_core.report.defences import known_defences

SEED = os.environ.get("UNDO_HOSTILE_SEED")
NAMES = [
    *("safetensors header", "safetensors, loaded", "safetensors, read by groups", "index of weight files", "index, loaded"),
    *("config.json", "config.json, loaded", "tokenizer.json", "tokenizer_config.json"),
    *("text", "JSONL", "Parquet, text", "Parquet, records", "questions", "questions in Parquet", "prepared sequences"),
    *("YAML settings", "run configuration", "sweep"),
    *("teacher's cache", "shard of a cache", "unfinished cache"),
    *(f"manifest, {kind}" for kind in ("relearn", "noise", "damage", "erase", "search", "measure")),
    "lock",
    *("training state", "training state, weights", "training state, optimizer", "log", "kept evaluation", "gate"),
    *("results", "results, drawn", "results of an attack"),
]


@pytest.fixture(scope="module")
def entry_points(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    found = {reader.name: reader for reader in readers(root)}
    assert list(found) == NAMES and sum(reader.full for reader in found.values()) >= 100_000
    for reader in found.values():
        (reader.file.parent / f"{MODULE}.py").write_text("raise SystemExit('this file was imported')\n")
    return found


@pytest.mark.parametrize("name", NAMES)
def test_no_mutated_file_does_more_than_be_refused(name, entry_points, tries, account):
    reader = entry_points[name]
    read, refused = attack(reader, tries(reader.quick, reader.full), None if SEED is None else int(SEED))
    account(f"hostile {name}", tried=read + refused, survived=read, refused=refused)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_or_a_link_in_the_place_of_a_file(name, entry_points, account):
    found = dict(odd_places(entry_points[name]))
    faults = {kind: fault for kind, fault in found.items() if fault not in ("", "refused")}
    assert not faults and len(found) == 4
    refused = sum(fault == "refused" for fault in found.values())
    account("folder or link in the place of a file", tried=4, survived=4 - refused, refused=refused)


def test_the_watch_sees_what_no_file_may_do(tmp_path):
    """The watch itself: each of these fails inside it, and none outside."""
    import socket
    import subprocess

    (tmp_path / "in").mkdir()
    for act in (
        lambda: os.system("true"),
        lambda: subprocess.run(["true"], check=True),
        lambda: socket.create_connection(("127.0.0.1", 9), 0.01),
        lambda: pickle.loads(pickle.dumps(os.getcwd)),
        lambda: (tmp_path / "out.txt").write_text("x"),
        lambda: (tmp_path / "in" / ".." / "out.txt").write_text("x"),
        lambda: (tmp_path / "out").mkdir(),
        lambda: os.rename(tmp_path / "in" / "a", tmp_path / "b"),
        lambda: __import__(MODULE),
    ):
        with pytest.raises(Escaped), watched(tmp_path / "in"):
            act()
    with watched(tmp_path / "in") as escapes:
        (tmp_path / "in" / "a").write_text("x")
        os.rename(tmp_path / "in" / "a", tmp_path / "in" / "b")
    assert not escapes and sorted(os.listdir(tmp_path)) == ["in"]


def changed(folder: Path, **settings) -> Path:
    """Writes a checkpoint whose configuration has these settings."""
    checkpoint(folder)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_a_checkpoint_runs_no_code(tmp_path):
    (tmp_path / "evil").mkdir()
    for name, settings in {
        "code": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
        "elsewhere": {"model_type": "evil", "auto_map": {"AutoConfig": "evil/repository--evil.C"}},
        "kernels": {"_attn_implementation": "evil/kernels"},
        "kernels of the hub": {"attn_implementation": {"": "evil/kernels:attend"}},
        "experts": {"experts_implementation": "evil/kernels"},
    }.items():
        folder = changed(tmp_path / "evil" / name, **settings)
        (folder / "evil.py").write_text("raise SystemExit('this file was imported')\n")
        for read in (load_model, read_configuration):
            with watched(folder) as escapes, pytest.raises(ValueError, match=r"config\.json"):
                read(folder)
            assert not escapes
        with watched(folder) as escapes, contextlib.suppress(ValueError):  # a tokenizer may be of a model that is not known
            load_tokenizer(folder)
        assert not escapes
    folder = checkpoint(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model", "peft_type": "LORA"}))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(os.getcwd))
    with watched(folder), pytest.raises(ValueError, match="holds an adapter"):
        load_model(folder)


def test_settings_name_no_code(tmp_path, monkeypatch):
    (tmp_path / f"{MODULE}.py").write_text("class Payload:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    payload = {"class_path": f"{MODULE}.Payload"}
    base = tmp_path / "base.yaml"
    for place in ("model", "noise", "attacks"):
        inner = {"config": {**RUN["model"]["config"], "x": payload}} if place == "model" else payload
        base.write_text(yaml.safe_dump({**RUN, place: {"a": inner} if place == "attacks" else inner}))
        with watched(tmp_path), pytest.raises(ValueError, match=r"base\.yaml.*class_path"):
            parser_arguments(["run", str(base)])
        with watched(tmp_path), pytest.raises(ValueError, match="class_path"):
            parse_value(base.read_text())
    base.write_text(yaml.safe_dump(RUN))
    for settings in (
        {"overrides": {"noise": payload}},
        {"overrides": {"model.config.x.class_path": f"{MODULE}.Payload"}},
        {"runs": [{"name": "a", "noise.class_path": f"{MODULE}.Payload"}]},
        {"overrides": {"config": str(base)}},
        {"overrides": {"print_config": ""}},
        {"overrides": {"help": ""}},
    ):
        sweep = SweepConfig(
            **{"name": "s", "base": str(base), "output": str(tmp_path / "out"), "grid": {"seed": [0]}, **settings}
        )
        with watched(tmp_path), pytest.raises((ValueError, ArgumentError)):
            expand(sweep)
    assert MODULE not in sys.modules


def test_a_name_in_a_file_leads_to_no_other_folder(tmp_path):
    outside = checkpoint(tmp_path / "outside") / SINGLE
    names = [
        "../outside/model.safetensors",
        str(outside),
        "a/../../outside/model.safetensors",
        "..\\x",
        "C:\\x",
        "C:x",
        "",
        "\0",
        5,
        None,
    ]
    for name in names:
        with pytest.raises(ValueError, match="somewhere: got the file name"):
            inside(tmp_path, name, "somewhere")
    assert inside(tmp_path, "a/b..c", "") == tmp_path / "a" / "b..c"
    indexed, named = checkpoint(tmp_path / "indexed", sharded=True), changed(tmp_path / "named", transformers_weights=names[0])
    index = json.loads((indexed / INDEX).read_text())
    for name in (*names[:3], 5):
        (indexed / INDEX).write_text(json.dumps({**index, "weight_map": dict.fromkeys(index["weight_map"], name)}))
        with pytest.raises(ValueError, match=r"index\.json"):
            load_model(indexed)
    with pytest.raises(ValueError, match=r"config\.json: got the file name"):
        load_model(named)
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(RUN))
    for overlay in (5, [5], {"a": 1}):
        with pytest.raises(ValueError, match="wanted a file or a list of files"):
            expand(SweepConfig("s", str(base), str(tmp_path / "out"), runs=[{"name": "a", "overlay": overlay}]))
    assert expand(SweepConfig("s", str(base), str(tmp_path / "out"), runs=[{"name": 5}]))[0].name == "5"
    for name in ("../../x", "/x", "..", "a/b"):
        with pytest.raises(ValueError, match="wanted the name of a folder"):
            expand(SweepConfig(name, str(base), str(tmp_path / "out"), grid={"seed": [0]}))
    found = results("a")
    path = tmp_path / "defences" / "a" / "trial_0" / "defence.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({**found, "seed": "../../x"}))  # a seed becomes part of a file's name
    with pytest.raises(ValueError, match=r"defence\.json: got a text in 'seed'"):
        known_defences(tmp_path)


def test_memory_is_limited(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, settings, said in (
        ("layers", {"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ("labels", {"num_labels": 10**9}, "num_labels"),
        ("nested", {"text_config": {"num_experts": 10**9}}, "num_experts"),
        ("other", {"configuration_files": ["config.4.0.0.json"]}, "n_layer"),
        ("vocabulary", {"vocab_size": 10**12}, "parameters a byte"),
        ("width", {"intermediate_size": 10**9}, "parameters a byte"),
    ):
        folder = changed(tmp_path / name, **settings)
        (folder / "config.4.0.0.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 10**12}))
        with limited() as begin, pytest.raises(ValueError, match=said):
            begin()
            load_model(folder)
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefghijkl")
    )
    merges = "a: &a {x: 1}\n" + "".join(
        f"{b}: &{b} {{<<: [{','.join([f'*{a}'] * 10)}]}}\n" for a, b in pairwise("abcdefghijkl")
    )
    path = tmp_path / "bomb.yaml"
    for text, said in (
        (bomb, "aliases"),
        (merges, "aliases"),
        ("#" * (1 << 20) + "\na: 1", "bytes"),
    ):
        path.write_text(text)
        with limited() as begin, pytest.raises(ValueError, match=said):
            begin()
            read_settings(path)
    with limited() as begin, pytest.raises(ValueError, match="aliases"):
        begin()
        parse_value("a: [" + "0, " * 100_000 + "0]")
    base = tmp_path / "base.yaml"
    base.write_text(yaml.safe_dump(RUN))
    many = {"grid": {f"noise.{name}": list(range(1000)) for name in ("alphas", "beta", "std")}}
    with pytest.raises(ValueError, match=r"^grid, runs: got 1,000,000,000 runs, wanted at most 10,000"):
        SweepConfig("s", str(base), str(tmp_path / "out"), **many)
    with pytest.raises(ValueError, match=r"^seeds: got 1000000000, wanted an integer <= 1000"):
        AttackConfig(seeds=10**9)
    table = tmp_path / "bomb.parquet"
    index = pyarrow.array([0] * 200_000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["y" * 1_000_000]))  # 200 GB of text in 70 kB
    found = pyarrow.table({"text": column})
    pyarrow.parquet.write_table(found, table, store_schema=False)  # the schema would say that it is a dictionary
    assert table.stat().st_size < 1 << 20
    with limited() as begin:
        begin()
        assert sum(map(len, islice(read_documents([str(table)]), 300))) == 300_000_000


def test_a_tokenizer_makes_no_text_much_longer(tmp_path):
    """Few bytes of a tokenizer could ask for more memory than there is, or more than JSON may have."""
    made = Tokenizer.from_str(tokenizer_of("llama").backend_tokenizer.to_str())
    table = b"\0" * 4 + b"x" * 2000 + b"\0"
    for name, normalizer, around in (
        ("replaced", [normalizers.Replace("a", "a" * 100)] * 6, "<bos> $A"),
        ("between", [normalizers.Replace(Regex(""), "aa")] * 40, "<bos> $A"),
        ("before", [normalizers.Prepend("a" * 5000)], "<bos> $A"),
        ("mapped", [normalizers.Precompiled(table)], "<bos> $A"),
        ("around", [], "<bos> " * 2000 + "$A"),
        ("repeated", [], "$A " * 2000),
    ):
        made.normalizer = normalizers.Sequence(normalizer)
        made.post_processor = processors.TemplateProcessing(around.strip(), None, [("<bos>", 1)])
        folder = tmp_path / name
        PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>").save_pretrained(folder)
        with pytest.raises(ValueError, match=r"^tokenizer: got .* times longer, wanted at most 1024"):
            load_tokenizer(folder)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581"), normalizers.NFKC()]
    )
    made.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>").save_pretrained(tmp_path / "usual")
    load_tokenizer(tmp_path / "usual")
    for name in ("tokenizer.json", "vocab.txt", "chat_template.jinja"):
        folder = checkpoint(tmp_path / f"large {name}")
        (folder / name).touch()
        os.truncate(folder / name, 1 << 40)
        with pytest.raises(ValueError, match=f"{re.escape(name)}: got 1,099,511,627,776 bytes"):
            load_tokenizer(folder)


def test_weights_are_looked_at_before_they_are_hashed(tmp_path):
    """A file that goes on after its tensors, an index of a million files and a NaN would take hours, or score as forgotten."""
    out, many = str(tmp_path / "out"), {f"k{n}": f"f{n}" for n in range(10_000)}
    longer, indexed, broken = (checkpoint(tmp_path / name) for name in ("longer", "indexed", "broken"))
    os.truncate(longer / SINGLE, 1 << 43)
    (indexed / SINGLE).unlink()
    (indexed / INDEX).write_text(json.dumps({"weight_map": many}))
    weights = load_file(broken / SINGLE)
    weights["lm_head.weight"][0, 0] = math.nan
    save_file(weights, broken / SINGLE)
    (questions := tmp_path / "q.jsonl").write_text('{"question": "a", "choices": ["a", "b"], "answer": 0, "subject": "s"}\n')
    for folder, said in ((longer, SINGLE), (indexed, "an index of 10,000 files"), (broken, r"lm_head\.weight holds NaN")):
        for arguments in (["noise", str(folder), out], ["evaluate", str(folder), "--multiple-choice", str(questions)]):
            with contextlib.redirect_stderr(io.StringIO()) as error:
                assert main(arguments) in (1, 2)
            assert re.search(said, error.getvalue()) and error.getvalue().count("\n") == 1, error.getvalue()


def test_the_command_says_one_line(tmp_path, capsys):
    """What the readers refuse, the command says in one line; one file of each kind."""
    folder, out = checkpoint(tmp_path / "plain"), str(tmp_path / "out")
    (tmp_path / "data" / "data").mkdir(parents=True)
    for path, content in {
        folder / CONFIG: b"[" * 100_000,
        tmp_path / "run.yaml": b"model: !!python/object/apply:os.system ['true']",
        tmp_path / "results-seed0.json": b'{"format": 1}',
        tmp_path / "q.jsonl": b'{"question": 5}\n',
        tmp_path / "whole.jsonl": b'{"question": "a?", "choices": ["a", "b"], "answer": 0, "subject": "s"}\n',
        tmp_path / "colour.yaml": yaml.safe_dump({**RUN, "name": "\x1b[31mred"}).encode(),
        tmp_path / "number.yaml": yaml.safe_dump({**RUN, "attacks": {1: {"rates": [1e-3]}}}).encode(),
        tmp_path / "data" / "data" / "test_forget.safetensors": b"\xff" * 64,
        tmp_path / "cache" / "cache.json": b'{"identity": []}',
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    good = str(checkpoint(tmp_path / "good"))
    for arguments in (
        ["noise", str(folder), out, "--alpha=0.5"],
        ["evaluate", str(folder), str(tmp_path / "data")],
        ["plan", str(tmp_path / "run.yaml")],
        ["sweep", str(tmp_path / "run.yaml"), "--dry-run"],
        ["report", str(tmp_path / "results-seed0.json"), f"--output={out}"],
        ["evaluate", good, "--multiple-choice", str(tmp_path / "q.jsonl")],
        ["evaluate", good, "--multiple-choice", str(tmp_path / "whole.jsonl")],  # a tokenizer without the characters
        ["plan", str(tmp_path / "number.yaml")],
        ["plan", str(tmp_path / "colour.yaml")],
        ["evaluate", good, str(tmp_path / "data")],
        ["distill", good, good, str(tmp_path / "data"), out, f"--cache={tmp_path / 'cache'}"],
    ):
        assert main(arguments) in (1, 2), arguments
        error = capsys.readouterr().err.splitlines()
        said = [line for line in error if line.startswith("undo: ")]
        assert len(said) == 1 and not any("Traceback" in line for line in error), (arguments, error)
        assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_every_promise_names_a_test():
    """SECURITY.md names only tests that exist, and no promise is without one."""
    root = Path(__file__).resolve().parents[2]
    promises = (root / "SECURITY.md").read_text().partition("## What undo-core promises")[2].split("\n- ")[1:]
    assert len(promises) >= 10
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", promise)
        assert named, f"no test: {promise}"
        for path, test in named:
            assert re.search(rf"^def {test}\(", (root / path).read_text(), re.MULTILINE), f"{path}::{test} does not exist"
    limits = set(re.findall(r"`([A-Z][A-Z_]+)`", (root / "SECURITY.md").read_text()))
    modules = [
        import_module(f"undo_core.{name}")
        for name in ("io.files", "pipeline.config_files", "pipeline.sweep_config", "models.folder", "models.loading")
    ]
    assert len(limits) >= 6 and all(any(hasattr(module, limit) for module in modules) for limit in limits)
