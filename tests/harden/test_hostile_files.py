"""Files from strangers: none runs code, leaves its folder, takes memory without a limit, or ends in more than one line."""

import os

import pytest

pytest.importorskip("resource", reason="the address space can be limited on Unix only")
pytest.importorskip("pyarrow")

from hostile import MODULE, Escaped, attack, odd_places, watched
from hostile_readers import readers

SEED = os.environ.get("UNDO_HOSTILE_SEED")
NAMES = [
    *("safetensors header", "safetensors, loaded", "safetensors, read by groups", "index of weight files", "index, loaded"),
    *("config.json", "config.json, loaded", "tokenizer.json", "tokenizer_config.json"),
    *("text", "JSONL", "Parquet, text", "Parquet, records", "questions", "questions in Parquet", "prepared sequences"),
    *("YAML settings", "run configuration", "sweep"),
    *("teacher's cache", "shard of a cache", "unfinished cache", "manifest", "lock"),
    *("training state", "training state, weights", "training state, optimizer", "log", "kept evaluation", "gate"),
    *("results", "results of an attack"),
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
    import pickle
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
