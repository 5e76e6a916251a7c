"""What ``make test-published`` proves at length, in small: the hub's formats, and that only what is named is cut."""

import dataclasses
import json
import re

import published
import pyarrow.parquet
import pytest
from hub_replica import QUESTIONS, large_tokenizer, write_replica

from undo_core.data.questions import MultipleChoiceConfig, posed, read_questions
from undo_core.data.reading import read_documents
from undo_core.report.results import settings_of

SMALL = {"wmdp-cyber": 7, "test": 12, "dev": 10}
COLUMNS = {
    "cais/wmdp/wmdp-cyber/test-00000-of-00001": "answer choices question",
    "cais/mmlu/all/test-00000-of-00001": "question subject choices answer",
    "cais/wmdp-corpora/cyber-forget-corpus/train-00000-of-00001": "text",
    "wikimedia/wikipedia/20231101.en/train-00000-of-00041": "id url title text",
    "HuggingFaceFW/fineweb-2/data/kor_Hang/train/000_00000": "text id dump url file_path language_score date language language_script "
    "minhash_cluster_size top_langs wordlist_ratio",
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_replica(folder, 5, SMALL, 2)
    return folder


def test_the_files_have_the_hubs_columns_and_parse(hub):
    for path, columns in COLUMNS.items():
        assert set(pyarrow.parquet.read_schema(hub / f"{path}.parquet").names) == set(columns.split()), path
    wmdp, mmlu, dev = (
        str(hub / f"cais/{path}-00000-of-00001.parquet") for path in ("wmdp/wmdp-cyber/test", "mmlu/all/test", "mmlu/all/dev")
    )
    assert [len(read_questions([path])) for path in (wmdp, mmlu, dev)] == list(SMALL.values())
    assert {question.subject for question in read_questions([wmdp])} == {""}
    questions, prompts = posed(MultipleChoiceConfig([mmlu], [dev], shots=5, limit=0.4))
    assert len(questions) == 6 and all(
        prompt.count("\nAnswer:") == 6 for prompt in prompts
    )  # 40 % of 6 of each subject, rounded up
    texts = [str(hub / f"{path}.parquet") for path in COLUMNS if "mmlu" not in path and "wmdp/" not in path]
    assert len(list(read_documents(texts))) == 3 * 5


def test_datasets_streams_them_by_the_names_of_the_configurations(hub, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(hub)
    for name in published.CONFIGS:
        data = published.configuration(name).data
        for part in (data.retain, data.forget, data.distill.sources):
            for source in part:
                assert len(list(read_documents([source]))) in (5, 10), (
                    source
                )  # two shards, or a line with a title and one with text
    assert [len(read_questions([source])) for source in ("hf://cais/wmdp:wmdp-cyber", "hf://cais/mmlu:all", "hf://cais/mmlu:all:dev")] == [
        7, 12, 10,
    ]  # fmt: skip


def test_the_tokenizer_fills_the_vocabulary():
    tokenizer = large_tokenizer()
    assert len(tokenizer) == 256_000 and max(tokenizer.get_vocab().values()) == 255_999
    assert [len(tokenizer(f" {letter}", add_special_tokens=False)["input_ids"]) for letter in "ABCD"] == [1] * 4
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 2


CUT = {
    "steps",
    "batch_size",
    "micro_batch_size",
    "warmup",
    "eval_every",
    "rates",
    "evaluate_at",
    "headline_step",
    "alphas",
    "recover",
}
CUT |= {"filter", "random", "output", "tokens", "valid_fraction"}
OWN = {
    "language": {"num_hidden_layers"},
    "arithmetic": {"num_hidden_layers", "train_rows", "eval_prompts", "tokenizer", "stop_retain", "stop_forget"},
    "wmdp": {"path", "first_layer", "target_layer"},
}


@pytest.mark.parametrize("name", published.CONFIGS)
def test_only_what_is_named_is_cut(name):
    full, cut = (
        settings_of({"config": dataclasses.asdict(config), "metric": {}})
        for config in (published.configuration(name), published.configuration(name, *published.overrides(name)))
    )
    differing = {key.rpartition(".")[2] for key in {**full, **cut} if full.get(key) != cut.get(key)}
    assert differing <= CUT | OWN[name] and OWN[name] <= differing
    assert cut["data.length"] == full["data.length"] and cut.get("data.distill.length") == full.get("data.distill.length")
    assert cut["distill.train.precision"] == full["distill.train.precision"]


def test_the_page_shows_the_recorded_results():
    results = json.loads(published.RESULTS.read_text())
    (shown,) = re.findall(r"(?s)<!-- published -->\n\n(.*)\n\n<!-- /published -->", published.PAGE.read_text())
    assert shown == published.page(results)
    streamed = results["data"]["hub"]["streamed"]
    assert [entry["questions"] for entry in streamed.values() if "questions" in entry] == list(QUESTIONS.values())
    for name, ran in results["run"].items():
        stages = {row["stage"]: row for row in ran["stages"]}
        assert list(stages) == [kind for kind in published.STAGES[name] if kind in stages]
        trained = [row for row in ran["stages"] if row["stage"] not in ("prepare", "noise")]
        assert all(row["finite"] and row["steps"] == 2 for row in trained)
        config = published.configuration(name)
        if attack := stages.get("relearn"):
            assert attack["published"][0] == config.relearn.batch_size and attack["length"] == config.data.length
            assert attack["step"][0] == attack["published"][0] or name == "arithmetic"


@pytest.mark.parametrize("name", published.CONFIGS)
def test_the_schedule_is_in_the_precision_of_the_configuration(name):
    config = published.configuration(name)
    wanted = {"pretrain": config.pretrain.train, "unlearn": config.unlearn.train, "distill": config.distill.train}
    for row in json.loads(published.RESULTS.read_text())["plan"][name]:
        if row["steps"]:
            kind = row["stage"].replace("data filtering", "pretrain").split()[0]
            assert row["precision"] == (config.relearn if kind == "relearn" else wanted[kind]).precision
            hours = row["flops"] / published.PEAK[row["precision"]] / published.COMPUTED / 3600
            assert row["one"] == pytest.approx(hours) and row["several"] >= hours / published.RANKS[name]
