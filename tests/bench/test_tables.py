"""The tables in the documents agree with the recorded results."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("tables")


def results():
    call = {"op": "vocab_loss", "backend": "cpu", "plan": "chunk", "form": "avx2", "gradient": True}

    def record(name, label, seconds, extra, **rest):
        timed = {"status": "measured", "samples_s": [seconds, 1.1 * seconds, 0.9 * seconds], "memory": {"extra_bytes": extra}}
        ran = {"both": [call] if name == "undo-core" else []}
        checked = {
            "verification": {"loss": 1e-8, "d_hidden": 2e-3, "d_weight": 1e-3, "verdict": "same", "ran": ran},
            "ran": ran,
        }
        return {"name": name, "label": label, "notes": []} | timed | checked | rest

    provenance = {"when": "2026-01-02T03:04:05+00:00", "commit": "abc", "command": "python bench/bench_kl.py", "threads": 2}
    contenders = [
        record("undo-core", "undo-core", 0.2, 12_000_000),
        record("plain", "plain torch", 0.5, 1_200_000_000),
        {"name": "trl", "label": "TRL", "status": "not installed: pip install trl", "notes": []},
        record("products", "four bare products", 0.1, 3_000_000),
    ]
    del contenders[-1]["verification"]
    row = {"id": "r", "tokens": 1024, "vocabulary": 32000, "width": 320, "dtype": "float32", "softcap": None, "rounds": 3}
    row |= {"provenance": provenance | {"versions": {"torch": "9.9"}}, "contenders": contenders}
    point = {"target_kl": 1e-4, "seeds": [{"kl": 1e-4, "loss": 0.0, "d_hidden": 0.0017, "d_weight": 0.001}]}
    curve = {"name": "undo-core", "label": "undo-core", "dtype": "bfloat16", "status": "measured", "points": [point]}
    curve |= {"row": "r", "tokens": 9, "ran": {"both": [call]}}
    section = {"seeds": 1, "provenance": provenance, "curves": [curve]}
    machine = {"name": "m", "cpu": "A processor", "kernels_vector_units": "avx2", "cores": 2}
    return {"format": 2, "suite": "kl-cpu", "machine": machine, "rows": [row], "error_versus_kl": section}


@pytest.fixture
def document(tmp_path):
    recorded = tmp_path / "bench" / "results" / "kl-cpu" / "m.json"
    recorded.parent.mkdir(parents=True)
    recorded.write_text(json.dumps(results()))
    text = "# Title\n\n{}\nbetween\n\n{}\nend\n".format(
        "<!-- bench:kl-cpu -->\n<!-- /bench:kl-cpu -->\n", "<!-- bench:kl-cpu:full -->\nold\n<!-- /bench:kl-cpu:full -->\n"
    )
    path = tmp_path / "docs" / "page.md"
    path.parent.mkdir()
    path.write_text(text)
    return path, recorded


def test_documents_say_what_the_results_say(tables):
    for path in DOCUMENTS:
        text = path.read_text()
        if tables.BLOCK.search(text):
            assert tables.rewrite(text, path, {}) == text, (
                f"python bench/tables.py {path.relative_to(ROOT)} rewrites its tables"
            )


def test_generation_is_idempotent_and_touches_nothing_else(tables, document):
    path, recorded = document
    assert tables.main([str(path), str(recorded)]) == 0
    once = path.read_text()
    assert once.startswith("# Title\n\n<!-- bench:kl-cpu -->\n") and once.endswith("<!-- /bench:kl-cpu:full -->\n\nend\n")
    assert "\nbetween\n" in once and "old" not in once
    assert "../bench/results/kl-cpu/m.json" in once
    assert "| **undo-core** | 200 ms · 12 MB | 0.17 % |" in once
    assert "| plain torch | 2.50× · 1.20 GB |" in once
    assert "Not run here: TRL (not installed)." in once and "| TRL | not installed |" not in once.split(":full")[0]
    assert tables.main([str(path)]) == 0  # the blocks name their results now
    assert path.read_text() == once
    assert tables.main([str(path), "--check"]) == 0


def test_what_a_newer_record_has_is_shown(tables, document):
    """A newer record shows the floor beside the time, the forward pass in the full table, and errors on activations."""
    path, recorded = document
    found = results()
    row = found["rows"][0]
    row |= {"group": "default", "model": "0.1B", "ceilings": {"flops": 1e9, "bytes_per_s": 1e9}}
    row["owed"] = {"forward": {"flops": 4e7, "bytes": 1e3}, "both": {"flops": 1e8, "bytes": 1e3}}
    for record in row["contenders"]:
        if record["status"] == "measured":
            record |= {"forward_s": [0.05, 0.04, 0.06], "forward_memory": {"extra_bytes": 7_000_000}}
    captured = json.loads(json.dumps(row)) | {"id": "captured-f32", "group": "all", "model": "generated", "captured_loss": 0.25}
    captured["contenders"][0]["verification"] |= {"loss": 1e-7, "d_hidden": 0.03, "d_weight": 0.01}
    hidden = json.loads(json.dumps(row)) | {"id": "sweep", "group": "all", "tokens": 7}
    found["rows"] += [captured, hidden]
    recorded.write_text(json.dumps(found))
    assert tables.main([str(path), str(recorded)]) == 0
    text = path.read_text()
    summary, full = text.split("\nbetween\n")
    assert "| **undo-core** | 200 ms · 50 % · 12 MB | 200 ms · 50 % · 12 MB · 3 % | 0.17 % |" in summary
    assert "(0.1B)" in summary and "(trained, generated)" in summary and "7 × 32k" not in summary and "7 × 32k" in full
    assert "| undo-core | 200 ms | 180 ms | 1.00× | 2.00× | 50 % | 12 MB | 50 ms | 1.00× | 80 % | 7.0 MB |" in full
    assert "Hidden states of generated, a true loss of 0.25" in full


def test_cross_entropy_has_a_table_of_its_own(tables, document):
    path, recorded = document
    found = results() | {"suite": "cross-entropy-cpu"}
    del found["error_versus_kl"]
    recorded.write_text(json.dumps(found))
    path.write_text("<!-- bench:cross-entropy-cpu -->\n<!-- /bench:cross-entropy-cpu -->\n")
    assert tables.main([str(path), str(recorded)]) == 0
    assert "| **undo-core** | 200 ms · 12 MB | 0.2 % |" in path.read_text() and "gradient error |" in path.read_text()


@pytest.mark.parametrize("where", ["verification", "curve", "unknown"])
def test_errors_of_another_path_than_the_timed_one_are_not_shown(tables, document, where):
    path, recorded = document
    found = results()
    ours = found["rows"][0]["contenders"][0]
    if where == "unknown":  # as in records from before anything was noted
        del ours["ran"]
    else:
        holder = ours["verification"] if where == "verification" else found["error_versus_kl"]["curves"][0]
        holder["ran"] = {"both": [{**ours["ran"]["both"][0], "backend": "reference", "plan": "direct", "form": ""}]}
    recorded.write_text(json.dumps(found))
    before = path.read_text()
    said = "what was timed was not noted" if where == "unknown" else "timed cpu, chunk, avx2, but verified reference, direct"
    with pytest.raises(SystemExit, match=said):
        tables.main([str(path), str(recorded)])
    assert path.read_text() == before


def test_what_ran_and_what_was_not_timed_is_said(tables, document):
    path, recorded = document
    found = results()
    row = found["rows"][0]
    row["accuracy_provenance"] = row["provenance"] | {"command": "python bench/bench_kl.py --accuracy"}
    ours = row["contenders"][0]
    for key in ("samples_s", "memory", "ran"):
        del ours[key]
    ours["status"] = "verified"
    recorded.write_text(json.dumps(found))
    assert tables.main([str(path), str(recorded)]) == 0
    text = path.read_text()
    assert "| **undo-core** | not timed | 0.17 % |" in text and "(avx2)" in text
    assert "undo-core ran: cpu, chunk, avx2." in text and "`python bench/bench_kl.py --accuracy`" in text


def test_check_finds_a_number_that_the_results_do_not_have(tables, document, capsys):
    path, recorded = document
    tables.main([str(path), str(recorded)])
    changed = path.read_text().replace("2.50×", "2.40×")
    path.write_text(changed)
    assert tables.main([str(path), "--check"]) == 1
    assert "differ" in capsys.readouterr().out
    assert path.read_text() == changed


def test_a_file_without_the_markers_is_refused(tables, document, capsys):
    path, recorded = document
    path.write_text("nothing here\n")
    with pytest.raises(SystemExit):
        tables.main([str(path), str(recorded)])
    assert "<!-- bench:kl-cpu -->" in capsys.readouterr().err


def test_a_block_that_names_no_results_is_refused(tables, document):
    path, _ = document
    with pytest.raises(SystemExit, match="names no results"):
        tables.main([str(path)])
