"""Files on disk: complete, whoever else writes them."""

import multiprocessing
from pathlib import Path

from undo_core.files import read_json, write_json


def write_often(path: Path, value: int) -> None:
    for _ in range(150):
        write_json(path, [value] * 50)


def test_two_processes_may_replace_the_same_file(tmp_path):
    path = tmp_path / "results.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(path, value)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert read_json(path) in ([1] * 50, [2] * 50) and [p.name for p in tmp_path.iterdir()] == ["results.json"]
