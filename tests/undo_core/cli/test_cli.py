"""A mistake gives one line that names the key and the fix, and exit code 2, before any work."""

import builtins
import os
from pathlib import Path

import pytest

from undo_core.cli import main
from undo_core.cli.parser import run_config
from undo_core.pipeline import run as pipeline_run
from undo_core.pipeline import store

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs" / "arithmetic-cpu.yaml")
TEMPLATE = str(ROOT / "configs" / "hf-template.yaml")
TEXT = [f"--data.retain=[{TEMPLATE}]", f"--data.forget=[{TEMPLATE}]"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["run", "nowhere.yaml"], ["nowhere.yaml", "not a file"]),
        (["run", DEMO, "--noise.alphas=[0.5,1.5]"], ["noise.alphas", "1.5", "[0, 1]"]),
        (["run", DEMO, "--noise.alpha=0.5"], ["noise.alpha"]),
        (["run", DEMO, "--unlearn.method=forgetful"], ["unlearn.method", "forgetful", "maxent"]),
        (["run", DEMO, "--pretrain.train.lr=fast"], ["pretrain.train.lr", "fast"]),
        (["run", DEMO, "--pretrain.train.steps=-3"], ["steps", "-3"]),
        (["run", DEMO, "--data.kind=text"], ["data.retain"]),
        (
            ["run", DEMO, "--data.kind=text", "--data.retain=[a.txt]", "--data.forget=[b.txt]", "--pretrain.stop_retain=null"],
            ["a.txt", "not a file"],
        ),
        (["run", DEMO, "--relearn.headline_step=77"], ["headline_step", "77"]),
        (["frobnicate"], ["frobnicate"]),
        (["unlearn", "no-model", "out", "no-data"], ["no-data", "undo prepare"]),
        (["noise", "no-model", "out", "--alpha=0.5"], ["model: got no-model, a folder that does not exist"]),
        (["noise", ".", "out"], ["model: got ., which has no config.json"]),
        (
            ["plan", TEMPLATE, "--model.path=google/gemma-2-2b", *TEXT],
            ["model.path", "does not exist", "hf download ORG/NAME --local-dir google/gemma-2-2b"],
        ),
        (
            ["plan", TEMPLATE, "--model.path=.", f"--data.retain=[{TEMPLATE}]", "--data.forget=[b.txt]"],
            ["data.forget: got b.txt"],
        ),
        (["noise", "no-model", "out", "--alpha=1.5"], ["alpha", "1.5", "[0, 1]"]),
        (["report", "none.json", "--output=out"], ["none.json"]),
        (["report", "a", "b"], ["results", "a"]),
        (["sweep", "nowhere.yaml"], ["nowhere.yaml", "not a file"]),
    ],
)
def test_one_line_and_exit_code_2(arguments, wanted, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("undo: error: ") and captured.err.count("\n") == 1, captured.err
    for word in wanted:
        assert word in captured.err
    assert list(tmp_path.iterdir()) == [], "nothing may be written before the mistake is found"


def test_a_file_that_is_no_yaml_is_one_line(tmp_path, capsys):
    path = tmp_path / "torn.yaml"
    path.write_text("a: [1\nb: 2")
    for command in ("plan", "run"):
        assert main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("undo: error: ") and error.count("\n") == 1 and "line 2" in error


def test_an_unknown_setting_of_the_architecture_is_named(tmp_path, capsys):
    """transformers accepts any keyword and would build a model of its default width."""
    assert main(["plan", DEMO, '--model.config={"model_type": "gemma2", "hiden_size": 96}']) == 2
    assert "model.config: got hiden_size, wanted hidden_size, or another setting of Gemma2Config" in capsys.readouterr().err


def test_an_unknown_key_in_the_file_is_named(tmp_path, capsys):
    config = tmp_path / "x.yaml"
    config.write_text(Path(DEMO).read_text() + "\ndistil: {recover: 0.1}\n")
    assert main(["run", str(config)]) == 2
    error = capsys.readouterr().err
    assert "distil" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "command", [[], ["run"], ["sweep"], ["plan"], ["unlearn"], ["noise"], ["distill"], ["relearn"], ["evaluate"], ["report"]]
)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "usage: undo" in text and len(text.splitlines()) > 5


@pytest.mark.parametrize("name", ["retain", "forget"])
def test_the_plan_refuses_a_file_of_the_wrong_form(name, capsys, tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"text": "a document"}\n')
    bad.write_text('{"body": "a document"}\n')
    files = {"retain": good, "forget": good, name: bad}
    language, output = str(ROOT / "configs" / "language-cpu.yaml"), tmp_path / "run"
    flags = [f"--data.{key}=[{path}]" for key, path in files.items()]
    assert main(["plan", language, *flags, f"--output={output}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"undo: error: {bad}, line 1: got no text in the field 'text' (the fields body)")
    assert error.count("\n") == 1 and not output.exists()


@pytest.mark.parametrize(
    ("load", "missing", "warned"), [(9.5, 2, True), (9.5, 0, False), (2.0, 2, False)], ids=["busy", "finished", "idle"]
)
def test_a_run_warns_of_a_busy_machine_once(load, missing, warned, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(store, "usable_cores", lambda: 2)
    left = [["a stage"]] * missing + [[]]
    monkeypatch.setattr(pipeline_run, "missing_stages", lambda *arguments: left.pop(0))
    for name in ("run_stages", "finish"):
        monkeypatch.setattr(pipeline_run, name, lambda *arguments: None)
    assert main(["run", DEMO, f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == printed.count("WARNING the load average is 9.5 on 2 cores") == int(warned)


@pytest.mark.parametrize(
    ("limit", "workers", "advised"), [(None, 1, True), ("1", 1, False), ("2", 1, True), (None, 2, False), ("2", 2, False)]
)
def test_a_busy_machine_gets_no_advice_that_is_followed_already(limit, workers, advised, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (9.5, 0.0, 0.0))
    monkeypatch.setattr(store, "usable_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limit:
        monkeypatch.setenv("OMP_NUM_THREADS", limit)
    warning = store.load_warning(workers)
    assert "the load average is 9.5 on 2 cores" in warning and ("OMP_NUM_THREADS=1 avoids that" in warning) == advised


def test_settings_are_utf8_in_every_locale(tmp_path, monkeypatch):
    opened = open

    def in_ascii(path, mode="r", buffering=-1, encoding=None, **how):
        return opened(path, mode, buffering, encoding or (None if "b" in mode else "ascii"), **how)

    file = tmp_path / "run.yaml"
    file.write_bytes("name: 한국어\n".encode())
    monkeypatch.setattr(builtins, "open", in_ascii)
    assert run_config([f"--config={DEMO}", f"--config={file}"]).name == "한국어"


def test_a_file_of_settings_that_names_itself_is_refused(tmp_path, capsys):
    for name, other in (("one", "two"), ("two", "one")):
        (tmp_path / f"{name}.yaml").write_text(f"config: {other}.yaml\n")
    assert main(["run", str(tmp_path / "one.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "one.yaml: got a config that leads back to this file" in error
