"""The table by processor shows what was recorded, and says which processor it lacks."""

import re
from pathlib import Path

import harness
import processors
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"


def results(title, seconds, **facts):
    machine = {
        "name": title.lower(),
        "cpu": title,
        "cpu_family_model_stepping": ["1", "2", "3"],
        "kernels_vector_units": "avx2",
        "cores": 2,
    }
    times = {"undo-core": seconds, "plain": 3 * seconds, "products": 0.5 * seconds}
    contenders = [{"name": name, "status": "measured", "samples_s": [each] * 3} for name, each in times.items()]
    row = {"tokens": 1024, "vocabulary": 32000, "width": 320, "dtype": "float32", "softcap": None, "contenders": contenders}
    capped = {**row, "softcap": 30.0, "contenders": []}
    return {"machine": {**machine, **facts}, "rows": [row, capped]}


def test_the_page_holds_the_printed_table():
    (written,) = re.findall(r"<!-- processors -->\n\n(.*?)\n\n<!-- /processors -->", PAGE.read_text(), re.S)
    assert written == processors.table()


def test_each_processor_has_a_column(monkeypatch):
    monkeypatch.setattr(processors, "records", lambda: iter([results("Alpha", 0.5), results("Beta", 2.0, note="Cold.")]))
    header, _, first, *_ = processors.table().splitlines()
    assert header == "| tokens × vocabulary × width | Alpha, avx2, 2 cores | Beta, avx2, 2 cores |"
    assert first == "| 1,024 × 32k × 320, float32 | 500 ms · 3.00× · 0.50× | 2 s · 3.00× · 0.50× |"
    assert processors.table().endswith("*Beta, avx2, 2 cores*: Cold.")


@pytest.mark.parametrize(("known", "said"), [(False, "no case"), (True, "1 of 6 cases")])
def test_a_processor_that_the_table_lacks_is_named(monkeypatch, capsys, known, said):
    here = harness.machine("cpu")
    monkeypatch.setattr(
        processors, "records", lambda: iter([results("Alpha", 0.5, **here)] if known else [results("Alpha", 0.5)])
    )
    processors.main([])
    assert f"The table by processor has {said} of this machine, {harness.whereabouts(here)}." in capsys.readouterr().out
    monkeypatch.setattr(processors, "CASES", processors.CASES[:1])
    assert (processors.missing() is None) == known
