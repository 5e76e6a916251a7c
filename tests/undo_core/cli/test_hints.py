"""The command line's answers to a misspelt name, to a call without arguments, and to a shell that completes."""

import errno
import importlib.util
import os
import re

import pytest
import torch
import yaml

from undo_core import cli
from undo_core.cli import main
from undo_core.cli.hints import FIRST_STEPS, nearest

DEMO = "configs/arithmetic-cpu.yaml"


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["rum", DEMO], "did you mean run?"),
        (["plan", DEMO, "--unlearn.trian.steps=3"], "did you mean unlearn.train.steps?"),
        (["plan", DEMO, "--alphas=[0.6]"], "did you mean noise.alphas or controls.gate.alphas or damage.alphas?"),
        (["plan", DEMO, "--unlearn.method=maxnet"], "did you mean maxent?"),
        (["plan", DEMO, "--noise.alpha=[0.6, 0.3]"], "arguments: --noise.alpha=[0.6, 0.3]; did you mean noise.alphas?"),
        (["plan", DEMO, "--data.f=x"], "unrecognized arguments: --data.f=x; did you mean data.forget?"),
        (["plan", DEMO, "--data.v=x"], "ambiguous option: --data.v=x could match --data.valid_fraction, --data.vocab_size"),
        (["noise", "model", "output", "--rule=[]"], "did you mean rules?"),
        (["noise", "model", "output", "--alhpa=0.6"], "did you mean alpha?"),
        (["plan", DEMO, "--unlearn.train.learning_rate=1e-4"], "learning_rate=1e-4; did you mean unlearn.train.lr?"),
        (["plan", DEMO, "--relearn.learning_rate=1e-4"], "did you mean relearn.rates?"),
        (["plan", DEMO, "--distill.learning_rate=1e-4"], "did you mean distill.train.lr?"),
    ],
)
def test_a_misspelt_name_on_the_command_line(capsys, arguments, wanted):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.rstrip().endswith(wanted) and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "wanted"),
    [
        ("--data.retain=a.txt", "data.retain: got a.txt, wanted a list, as in '[a.txt]', or a mapping, as in '{KEY: VALUE}'"),
        ("--data.retain=[1]", "data.retain: got 1, wanted text"),
        ("--data.retain={a: x}", "data.retain: got x, wanted a number"),
        ("--noise.alphas=0.3", "noise.alphas: got 0.3, wanted a list, as in '[0.3]'"),
        ("--noise.alphas=[a]", "noise.alphas: got a, wanted a number"),
        ("--noise.rules=[x]", "noise.rules: got x, wanted a mapping, as in '{KEY: VALUE}'"),
        ("--unlearn.train.steps=1.5", "unlearn.train.steps: got 1.5, wanted a whole number"),
        ("--unlearn.train.steps=null", "unlearn.train.steps: got null, wanted a whole number"),
        ("--distill.recover=x", "distill.recover: got x, wanted a number or null"),
        ("--relearn.save=maybe", "relearn.save: got maybe, wanted true or false"),
        ("--model=x", "model: got x, wanted a mapping, as in '{KEY: VALUE}'"),
        ("--model.config=x", "model.config: got x, wanted a mapping, as in '{KEY: VALUE}'"),
        (
            "--data.questions.forget=x.json",
            "data.questions.forget: got x.json, wanted a mapping, as in '{KEY: VALUE}', or null",
        ),
        (
            "--distill.teacher.kind=resdent",
            "distill.teacher.kind: got resdent, wanted one of resident, streamed, cached, topk; did you mean resident?",
        ),
        ("--noise.law=y", "noise.law: got y, wanted one of xavier_uniform, xavier_normal, normal"),
        ("--attacks={a: {kind: lora, rates: 3}}", "attacks: rates: got 3, wanted a list, as in '[3]'"),
        ("--attacks={a: {kind: lora, lora: {rank: x}}}", "attacks: lora.rank: got x, wanted a whole number"),
        ("--students={a: {alpha: [x]}}", "students: alpha: got ['x'], wanted a number or null"),
        ("--measures={a: {kind: cka, sequences: x}}", "measures: sequences: got x, wanted a whole number"),
    ],
)
def test_a_value_of_a_wrong_type(capsys, flag, wanted):
    assert main(["plan", DEMO, flag]) == 2
    assert capsys.readouterr().err == f"undo: error: {wanted}\n"


def test_a_value_of_a_wrong_type_in_a_file(capsys, tmp_path):
    (tmp_path / "over.yaml").write_text("noise: {alphas: 0.3}")
    assert main(["plan", DEMO, "--config", str(tmp_path / "over.yaml")]) == 2
    assert capsys.readouterr().err == "undo: error: noise.alphas: got 0.3, wanted a list, as in '[0.3]'\n"


@pytest.mark.parametrize("seed", [1 << 64, -(10**30)])
def test_a_seed_that_results_cannot_hold(capsys, seed):
    assert main(["plan", DEMO, f"--seed={seed}"]) == 2
    assert capsys.readouterr().err == f"undo: error: seed: got {seed}, wanted an integer of at most 64 bits\n"


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("relearn: [{rates: [0.1]}]", "relearn: got [{'rates': [0.1]}]"),
        ("data: 3", "data: got 3"),
        ("noise: {}\ncontrols:", "controls: got nothing"),
        ("distill: {train: [1]}", "distill.train: got [1]"),
    ],
)
def test_a_section_that_is_no_mapping(capsys, tmp_path, text, got):
    """Its settings would count for nothing."""
    over, sweep = tmp_path / "over.yaml", tmp_path / "sweep.yaml"
    over.write_text(text)
    line = f"{got}, wanted settings, each as NAME: VALUE\n"
    assert main(["plan", DEMO, "--config", str(over)]) == 2
    assert capsys.readouterr().err == f"undo: error: {line}"
    settings = {"name": "s", "base": DEMO, "output": str(tmp_path / "out"), "overlays": [str(over)], "grid": {"seed": [0]}}
    sweep.write_text(yaml.safe_dump(settings))
    assert main(["sweep", str(sweep), "--dry-run"]) == 2
    assert capsys.readouterr().err == f"undo: error: run s: {line}"


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        (["sed"], "seed"),
        (["pretrain", "train", "stesp"], "pretrain.train.steps"),
        (["unlern", "train", "stesp"], "unlearn.train.steps"),
        (["attacks", "mine", "kidn"], "kind"),
        (["unlearn", "train", "learning_rate"], "unlearn.train.lr"),
        (["noise", "alpha"], "noise.alphas"),
    ],
)
def test_a_misspelt_key_in_a_file(capsys, tmp_path, path, wanted):
    values = nested = {"name": "x", "output": "runs/x"}
    for key in path[:-1]:
        nested = nested.setdefault(key, {})
    nested[path[-1]] = 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert main(["plan", str(tmp_path / "config.yaml")]) == 2
    printed = capsys.readouterr().err
    assert printed.rstrip().endswith(f"did you mean {wanted}?")
    assert printed.startswith(f"undo: error: {tmp_path / 'config.yaml'}: ") and path[-1] in printed


def test_a_misspelt_key_in_the_file_that_overrides(capsys, tmp_path):
    (tmp_path / "over.yaml").write_text("unlearn: {train: {learning_rate: 0.1}}")
    assert main(["plan", DEMO, "--config", str(tmp_path / "over.yaml")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"undo: error: {tmp_path / 'over.yaml'}: ") and printed.endswith("mean unlearn.train.lr?\n")


def test_nothing_near_is_not_guessed(capsys):
    assert nearest("zzzz", ["seed", "noise.alphas"]) == []
    assert nearest("gird.seed", ["seed", "grid", "runs"]) == ["grid.seed"]
    assert nearest("seed.first", ["seed", "grid", "runs"]) == []
    assert main(["plan", DEMO, "--zzzz=3"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_no_arguments_teach(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert printed == FIRST_STEPS + "\n" and len(printed.splitlines()) == 11
    parsers = cli.command_parser("")._subcommands_action._name_parser_map
    assert {line.split()[1] for line in printed.splitlines() if line.startswith("  undo ")} <= {
        *parsers,
        "completion",
        "--help;",
    }


def test_completion(capsys):
    assert main(["completion", "fish"]) == 2
    assert "expected one of bash, zsh, tcsh" in capsys.readouterr().err
    there = importlib.util.find_spec("shtab") is not None
    assert main(["completion"]) == (0 if there else 2)
    printed = capsys.readouterr()
    assert "complete" in printed.out if there else "pip install 'undo-core[completion]'" in printed.err


def test_help_hides_the_forms_of_flags_that_append(capsys):
    for command, listed in (("run", "--noise.alphas [ITEM,...]\n"), ("evaluate", "--examples EXAMPLES")):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        printed = capsys.readouterr().out
        assert listed in printed and not re.search(r"--[\w.]+\+", printed)


def test_help_keeps_its_examples(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert (
        "\n\n  undo plan configs/arithmetic-cpu.yaml\n  undo plan configs/arithmetic-cpu.yaml --memory 8GB\n"
        "  undo plan configs/arithmetic-cpu.yaml --ranks 2\n\nWith --memory" in printed
    )


@pytest.fixture
def failing(monkeypatch):
    """Makes ``undo doctor`` a command that calls a function; returns its exit code."""

    def run(function) -> int:
        def doctor() -> int:
            """Fails."""
            return function()

        monkeypatch.setitem(cli.COMMANDS, "doctor", doctor)
        return main(["doctor"])

    return run


def throw(error):
    raise error


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space, and the same command continues"),
        (errno.EROFS, "make it accessible, and the same command continues"),
        (errno.EMFILE, "allow more open files (ulimit -n), and the same command continues"),
    ],
)
def test_an_error_of_the_disk_says_what_to_do(capsys, failing, number, advice):
    assert failing(lambda: throw(OSError(number, os.strerror(number), "out/file"))) == 1
    assert capsys.readouterr().err == f"undo: failed: [Errno {number}] {os.strerror(number)}: 'out/file'; {advice}\n"


def test_memory_that_cannot_be_had_is_one_line(capsys, failing):
    assert failing(lambda: torch.empty(1 << 62, dtype=torch.uint8)) == 1
    line = (
        f"undo: failed: out of memory ({1 << 62} bytes were asked for); `undo plan CONFIG --memory SIZE` finds what fits, and"
    )
    assert capsys.readouterr().err == f"{line} the same command continues\n"
    assert failing(lambda: throw(ImportError("torch.so: failed to map segment from shared object"))) == 2
    assert capsys.readouterr().err.endswith("shared object; free some memory, and the same command continues\n")
    assert failing(lambda: throw(MemoryError())) == 1 and capsys.readouterr().err.startswith(
        "undo: failed: out of memory; `undo plan"
    )
