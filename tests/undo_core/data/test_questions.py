"""Runs scored by multiple-choice questions: sequences, splits, and `undo run` end to end compared with `undo evaluate`."""

import importlib
import json
import math
import random
import string
import sys

import pytest
import torch
from generated_questions import WORDS, bytewise_tokenizer, questions, write

from undo_core import evaluate as evaluate_sequences
from undo_core import few_shot
from undo_core.cli import main
from undo_core.data.config import DataConfig, QuestionsConfig
from undo_core.data.question_sequences import question_splits
from undo_core.data.questions import MultipleChoiceConfig, read_questions
from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.evaluation.multiple_choice import multiple_choice
from undo_core.io.files import read_json
from undo_core.models import build_model
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import PretrainConfig, RunConfig
from undo_core.pipeline.stages.prepare import prepare_stage

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ABOUT = "About {subject}.\n\n"


@pytest.fixture(scope="module")
def bytewise():
    return bytewise_tokenizer()


@pytest.fixture(scope="module", params=["gemma2", "llama", "cohere"])
def model(request, bytewise):
    """Models with a softcap, without one, and with a scale on the logits; the answers of each vary between questions."""
    made = build_model({"model_type": request.param, "max_position_embeddings": 80, **MODEL}, bytewise, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)
    return made


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Questions of two to four choices and their format; some prompts are longer than the models' positions."""
    folder = tmp_path_factory.mktemp("asked")
    files = [write(folder / "q.jsonl", questions(60, seed=1, choices=(2, 4)))]
    examples = [write(folder / "dev.jsonl", questions(9, seed=2))]
    return MultipleChoiceConfig(files, examples, shots=1, description=ABOUT, limit=0.8)


def splits_of(bytewise, asked, **changes):
    how = {"valid_fraction": 0.4, "seed": 7, "positions": 80, **changes}
    return question_splits(bytewise, {"forget": asked}, **how)


def test_sequences_are_scored_as_questions_are(model, bytewise, asked):
    """The scores of both splits together equal those of the command, which another test compares with lm-eval's."""
    wanted = multiple_choice(model, bytewise, asked)
    splits, cut = splits_of(bytewise, asked)
    assert 0 < sum(cut.values()) == wanted["truncated"] < wanted["n"]
    for size in (None, 1, 7):
        got = [evaluate_sequences(model, sequences, batch_size=size) for sequences in splits.values()]
        assert sum(part["n"] for part in got) == wanted["n"] == 49
        assert sum(part["value"] * part["n"] for part in got) == pytest.approx(wanted["value"] * wanted["n"])
        for name, group in wanted["groups"].items():
            parts = [part["groups"][name] for part in got]
            assert sum(part["value"] * part["n"] for part in parts) == pytest.approx(group["value"] * group["n"])
    assert 0.1 < wanted["value"] < 0.9, "the model must be half right for this to show anything"


def test_the_right_letter_is_the_likeliest_of_the_models_own_logits(model, bytewise, tmp_path):
    """Compares with texts written out here, and with tokens and logits of transformers."""
    files = [write(tmp_path / "q.jsonl", made := questions(25, seed=5, subjects=("biology",)))]
    splits, _ = splits_of(bytewise, MultipleChoiceConfig(files, description=ABOUT), positions=None, valid_fraction=0.3)
    right = []
    for question in made:
        a, b, c, d = question.choices
        ids = bytewise(f"About biology.\n\n{question.question.strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        letters = [bytewise.convert_tokens_to_ids(f"Ġ{letter}") for letter in "ABCD"]
        right.append(int(logits[letters].argmax()) == question.answer)
    got = [evaluate_sequences(model, sequences) for sequences in splits.values()]
    assert sum(part["value"] * part["n"] for part in got) == pytest.approx(sum(right)) and 0 < sum(right) < 25


def test_sequences_of_like_lengths_run_together(bytewise, tmp_path, monkeypatch):
    module = importlib.import_module("undo_core.evaluation.metrics")  # the package's name of the function
    model = build_model({"model_type": "llama", "max_position_embeddings": 4000, **MODEL}, bytewise, 0)
    long = [vars(question) | {"question": "very long " * 250} for question in questions(3, seed=3)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in [*map(vars, questions(120, seed=1)), *long]))
    sequences = splits_of(bytewise, MultipleChoiceConfig([str(path)]), positions=None, valid_fraction=0.01)[0]["test_forget"]
    shapes, forward = [], module.hidden_states
    monkeypatch.setattr(module, "POSITIONS", 1000)
    monkeypatch.setattr(
        module, "hidden_states", lambda model, ids, *a: shapes.append(tuple(ids.shape)) or forward(model, ids, *a)
    )
    evaluate_sequences(model, sequences)
    assert sum(count for count, _ in shapes) == len(sequences) and len(shapes) < len(sequences) // 3
    assert all(count * (length + 1) <= 1000 or count == 1 for count, length in shapes)
    lengths = [length for _, length in shapes]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 10 * lengths[-1]
    assert sum(count * length for count, length in shapes) < 1.4 * sequences.tokens() < 0.2 * sequences.input_ids.numel()


def test_a_diverged_model_answers_nothing(bytewise, asked):
    model = build_model({"model_type": "llama", **MODEL}, bytewise, 0)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(math.nan)
    for sequences in splits_of(bytewise, asked)[0].values():
        assert evaluate_sequences(model, sequences)["value"] == 0
    assert multiple_choice(model, bytewise, asked)["value"] == 0


def test_a_questions_split_is_its_own(bytewise, tmp_path):
    """Copies fall into the same split, the seed decides the split, and no question depends on another."""
    made = questions(80, seed=1)

    def texts(asked, seed):
        files = [write(tmp_path / "q.jsonl", asked)]
        splits, _ = splits_of(bytewise, MultipleChoiceConfig(files), seed=seed, positions=None)
        prompts = {}
        for name, sequences in splits.items():
            ends = sequences.answer_mask.int().argmax(1).tolist()
            prompts[name] = {bytewise.decode(sequence[:end]) for sequence, end in zip(sequences.input_ids, ends, strict=True)}
            assert len(sequences) >= len(prompts[name])
        return prompts["valid_forget"], prompts["test_forget"]

    valid, test = texts(made, 1)
    assert not valid & test and len(valid | test) == 80 and 16 < len(valid) < 48
    again = texts([*made[:40], *made[:20], *questions(30, seed=6)], 1)
    assert not again[0] & again[1] and again[0] & valid | again[1] & test == (again[0] | again[1]) & (valid | test)
    assert texts(made, 2)[0] != valid


def test_sequences_with_choices_survive_the_disk_and_are_checked(bytewise, asked, tmp_path):
    sequences = splits_of(bytewise, asked)[0]["test_forget"]
    sequences.save(tmp_path / "sequences.safetensors")
    back = Sequences.load(tmp_path / "sequences.safetensors")
    assert torch.equal(back.choices, sequences.choices) and (sequences.choices == -1).any()
    ids, mask, letters = torch.tensor([[5, 6, 7]]), torch.tensor([[False, False, True]]), torch.tensor([[7, 8]])
    Sequences(ids, 0, mask, choices=letters)
    for changes, name in (
        ({"choices": letters[0]}, "choices: got shape"),
        ({"choices": letters + 1}, "choices: got sequences whose answer"),
        ({"answer_mask": None}, "answer_mask: got"),
        ({"answer_mask": ~mask}, "answer_mask: got"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            Sequences(**{"input_ids": ids, "pad_id": 0, "answer_mask": mask, "choices": letters, **changes})
    model = build_model({"model_type": "llama", **MODEL}, bytewise, 0)
    with pytest.raises(ValueError, match=r"^sequences: got token id 4000"):
        evaluate_sequences(model, Sequences(ids, 0, mask, choices=torch.tensor([[7, 4000]])))


def test_answered_questions_are_shown_before_a_question(bytewise, tmp_path):
    """The few-shot attack puts examples before a question and keeps its letters and its answer."""
    files = [write(tmp_path / "q.jsonl", questions(30, seed=4, choices=(2, 4)))]
    splits, _ = splits_of(bytewise, MultipleChoiceConfig(files, description="It.\n\n"), positions=None)
    sequences, shown = splits["test_forget"], splits["valid_forget"]
    between = bytewise.encode("\n\n", add_special_tokens=False)
    prompted, _ = few_shot(sequences, shown, 2, seed=0, positions=None, between=between)
    examples = {bytewise.decode(sequence[sequence != 0]) for sequence in shown.input_ids}
    assert torch.equal(prompted.choices, sequences.choices)
    for sequence, answer, long, mask in zip(
        sequences.input_ids, sequences.answer_mask, prompted.input_ids, prompted.answer_mask, strict=True
    ):
        *before, own = bytewise.decode(long[long != 0]).split("<bos>")[1:]
        assert "<bos>" + own == bytewise.decode(sequence[sequence != 0]) and long[mask].tolist() == sequence[answer].tolist()
        assert len(before) == 2 and all(text.endswith("\n\n") and "<bos>" + text[:-2] in examples for text in before)
    once, _ = few_shot(sequences, shown, 2, seed=0, positions=None, between=between, lead=bytewise.bos_token_id)
    for long, mask, sequence, own in zip(
        prompted.input_ids, prompted.answer_mask, once.input_ids, once.answer_mask, strict=True
    ):
        text = bytewise.decode(sequence[sequence != 0])
        assert text.rindex("<bos>") == 0 and text[5:] == bytewise.decode(long[long != 0]).replace("<bos>", "")
        assert sequence[own].tolist() == long[mask].tolist() and int(own.sum()) == 1


def test_hub_questions_are_streamed(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(name, config, *, split, streaming):
            assert (name, config, streaming) == ("cais/mmlu", "all", True)
            return iter([{**vars(question), "choices": list(question.choices), "subject": split} for question in questions(3)])

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    assert [question.subject for question in read_questions(["hf://cais/mmlu:all", "hf://cais/mmlu:all:dev"])] == [
        *["test"] * 3,
        *["dev"] * 3,
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'undo-core\[data\]'"):
        read_questions(["hf://cais/mmlu:all"])


def test_what_cannot_be_scored_is_named(bytewise, tmp_path):
    files = [write(tmp_path / "q.jsonl", questions(20))]
    many = [write(tmp_path / "many.jsonl", questions(20, choices=(6, 6)))]
    letterless = character_tokenizer("".join(sorted({*" .,:?()\nABCDEFGHT", *string.ascii_lowercase})))
    for tokenizer, names, changes, message in (
        (bytewise, many, {}, r"data\.tokenizer: got the tokens \[\d+, \d+\] for ' E' after a prompt"),
        (letterless, files, {}, r"data\.tokenizer: got the tokens \[\d+, \d+\] for ' A' after a prompt"),
        (
            bytewise,
            files,
            {"valid_fraction": 1e-9},
            r"data\.questions\.valid_fraction: got 1e-09, with which none of forget's 20",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            splits_of(tokenizer, MultipleChoiceConfig(names), **changes)
    bare = [write(tmp_path / "bare.jsonl", questions(5, subjects=("",)))]
    with pytest.raises(ValueError, match=r"^description: got 'About {subject}.*a question without a subject"):
        splits_of(bytewise, MultipleChoiceConfig(bare, description=ABOUT))
    splits_of(bytewise, MultipleChoiceConfig(bare, description="About it.\n\n"))


def test_bad_settings_are_named(tmp_path):
    one = MultipleChoiceConfig(["q.jsonl"])
    text = {"kind": "text", "retain": ["a.txt"], "forget": ["b.txt"]}
    for make, message in (
        (lambda: QuestionsConfig(forget=one), "data.questions.retain: got none beside those of forget"),
        (lambda: QuestionsConfig(retain=one), "data.questions.forget: got none beside those of retain"),
        (lambda: QuestionsConfig(one, one, 0.0), "data.questions.valid_fraction: got 0.0"),
        (lambda: DataConfig(questions=QuestionsConfig(one, one)), "data.questions: got some with kind arithmetic-compact"),
        (
            lambda: RunConfig(
                "x", "y", ModelConfig(config={"a": 1}), data=DataConfig(**text), pretrain=PretrainConfig(stop_retain=0.5)
            ),
            "pretrain.stop_retain: got 0.5 with text that is scored by its cross-entropy",
        ),
    ):
        with pytest.raises(ValueError) as error:
            make()
        assert str(error.value).startswith(message)
    assert DataConfig().metric == "accuracy" and DataConfig(**text).metric == "loss"
    assert DataConfig(**text, questions=QuestionsConfig(one, one)).metric == "accuracy"


def test_questions_are_part_of_the_key_and_only_where_there_are_some(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    text = {"kind": "text", "retain": [str(tmp_path / "a.txt")], "forget": [str(tmp_path / "b.txt")]}
    model = ModelConfig(config={"model_type": "llama"})
    plain = prepare_stage(DataConfig(**text), model, 0)
    assert "questions" not in plain.settings["data"], "keys of runs without questions are as they were"
    path, dev = tmp_path / "q.jsonl", tmp_path / "dev.jsonl"
    write(path, questions(3)), write(dev, questions(3))
    one, two = MultipleChoiceConfig([str(path)]), MultipleChoiceConfig([str(path)], [str(dev)], 1)
    data = DataConfig(**text, questions=QuestionsConfig(one, two))
    keys = {plain.key, prepare_stage(data, model, 0).key}
    write(dev, questions(3, seed=1))
    keys.add(prepare_stage(data, model, 0).key)
    assert len(keys) == 3, "the files' contents count, those of examples too"
    dev.unlink()
    with pytest.raises(FileNotFoundError, match=r"data\.questions\.retain\.examples: got .*dev\.jsonl, which is not a file"):
        prepare_stage(data, model, 0)


RUN = """
name: asked
output: {folder}/out
data:
  kind: text
  retain: [{folder}/retain.jsonl]
  forget: [{folder}/forget.jsonl]
  length: 32
  tokenizer: {folder}/tokenizer
  questions:
    valid_fraction: 0.3
    forget: {{files: [{folder}/wmdp.jsonl], description: "About it.\\n\\n"}}
    retain: {{files: [{folder}/mmlu.jsonl], examples: [{folder}/dev.jsonl], shots: 2, limit: 0.5}}
model:
  config:
    model_type: gemma2
    hidden_size: 16
    intermediate_size: 32
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 1
    head_dim: 8
    max_position_embeddings: 256
pretrain: {{stop_retain: 0.99, train: {{steps: 40, batch_size: 8, lr: 1.0e-2, eval_every: 20}}}}
unlearn: {{train: {{steps: 2, batch_size: 4, lr: 1.0e-3}}}}
noise: {{alphas: [0.6]}}
distill: {{recover: -1.0, teacher: {{kind: cached, dtype: bfloat16}}, train: {{steps: 2, batch_size: 4, lr: 1.0e-3, eval_every: 1}}}}
controls: {{random: false, filter: false, gate: {{share: 0.2}}}}
relearn: {{rates: [1.0e-2], evaluate_at: [0, 2], headline_step: 2, extend: 0, batch_size: 4}}
attacks:
  bits: {{kind: quantise, bits: [4], group_size: 16}}
  shown: {{kind: fewshot, shots: [1]}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bytewise):
    """Returns the folder and the configuration of a finished run on generated text and questions."""
    folder = tmp_path_factory.mktemp("asked-run")
    draw = random.Random(0)
    for name, words in (("retain", WORDS[:6]), ("forget", WORDS[6:])):
        lines = [
            {"text": " ".join(draw.choices(words, k=draw.randint(8, 30))) + f"\nAnswer: {draw.choice('ABCD')}"}
            for _ in range(200)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    bytewise.save_pretrained(folder / "tokenizer")
    write(folder / "wmdp.jsonl", questions(60, seed=1, subjects=("",), choices=(2, 4)))
    write(folder / "mmlu.jsonl", questions(120, seed=2)), write(folder / "dev.jsonl", questions(9, seed=3))
    config = folder / "run.yaml"
    config.write_text(RUN.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        assert main(["plan", str(config)]) == 0 and main(["run", str(config)]) == 0
    return folder


def test_a_run_scores_questions_before_after_and_under_every_attack(finished):
    results = read_json(finished / "out" / "results-seed0.json")
    assert results["metric"]["kind"] == "accuracy"
    sizes = results["metric"]["eval_splits"]
    assert sizes["valid_forget"] + sizes["test_forget"] == 60 and 58 <= sizes["valid_retain"] + sizes["test_retain"] <= 62
    assert [model["name"] for model in results["models"]] == ["original", "unlearn", "undo-0.6", "gated"]
    for model in results["models"]:
        for name in ("forget", "retain"):
            assert model["metrics"][name]["n"] == sizes[f"test_{name}"]
        assert set(model["metrics"]["retain"]["groups"]) == {"biology", "computer_security"}
        if model["attack"]:
            for attack in (model["attack"], *model["attacks"].values()):
                points = [point for curve in attack["curves"] for name in ("forget", "retain") for point in curve[name]]
                assert points and all(0 <= point["value"] <= 1 and point["n"] > 20 for point in points)
            before = model["attack"]["curves"][0]["forget"][0]
            assert before["value"] == model["metrics"]["forget"]["value"]
    page = (finished / "out" / "report" / "report.html").read_text()
    assert "share of multiple-choice questions whose right letter is the likeliest" in page and "nats" not in page


def test_its_scores_are_those_of_the_command(finished, bytewise, tmp_path, capsys):
    """Compares with `undo evaluate --multiple-choice` on each model's folder and the questions of the test split."""
    results = read_json(finished / "out" / "results-seed0.json")
    (data,) = (finished / "out" / "stages").glob("prepare-*/data")
    flags = {
        "forget": ("wmdp", ["--description=About it.\n\n"]),
        "retain": ("mmlu", [f"--examples={finished / 'dev.jsonl'}", "--shots=2"]),
    }
    values = set()
    for name, (file, options) in flags.items():
        sequences = Sequences.load(data / f"test_{name}.safetensors")
        tested = {
            bytewise.decode(sequence[:end])
            for sequence, end in zip(sequences.input_ids, sequences.answer_mask.int().argmax(1), strict=True)
        }
        everything = read_questions([finished / f"{file}.jsonl"])
        chosen = [question for question in everything if any(text.endswith(question.prompt()) for text in tested)]
        assert len(chosen) == len(sequences) < len(everything)
        path = write(tmp_path / f"{name}.jsonl", chosen)
        for model in results["models"]:
            capsys.readouterr()
            folder = str(finished / "out" / "stages" / model["stage"])
            assert main(["evaluate", folder, "--multiple-choice", path, *options]) == 0
            wanted = json.loads(capsys.readouterr().out)["multiple_choice"]
            got = model["metrics"][name]
            assert {key: got[key] for key in ("value", "low", "high", "n")} == {
                key: wanted[key] for key in ("value", "low", "high", "n")
            }
            values.add(wanted["value"])
    assert len(values) > 2


def test_stop_rules_follow_the_metric(finished):
    stages = finished / "out" / "stages"
    (pretrained,) = map(read_json, stages.glob("pretrain-*/manifest.json"))
    assert pretrained["limit_reached"] and pretrained["stopped"] is False, "a loss would have been above 0.99 at once"
    results = read_json(finished / "out" / "results-seed0.json")
    (cache,) = map(read_json, stages.glob("cache-*/manifest.json"))
    assert results["metric"]["retain_target"] == pytest.approx(cache["retain"] + 1), "an accuracy is met within a difference"


def test_text_is_held_out_beside_the_questions(finished):
    """The error of a cache and the quality of a gate are measured on text."""
    stages = finished / "out" / "stages"
    (data,) = stages.glob("prepare-*/data")
    splits = {path.stem: Sequences.load(path) for path in data.iterdir()}
    kinds = {name: sequences.answer_mask is not None for name, sequences in splits.items()}
    asked = {f"{split}_{name}": True for split in ("valid", "test") for name in ("retain", "forget")}
    texts = {f"{split}_{name}": False for split in ("train", "valid_text") for name in ("retain", "forget")}
    assert kinds == {**asked, **texts}
    (gate,) = map(read_json, stages.glob("gate-*/manifest.json"))
    assert gate["heldout"]["forget_rows"] == len(splits["valid_text_forget"])
    (cache,) = map(read_json, stages.glob("cache-*/manifest.json"))
    assert cache["error"]
    for path in stages.glob("*/manifest.json"):
        assert read_json(path).get("predicted_bytes", 1) is not None


def test_what_is_cut_is_said(finished, tmp_path, capsys):
    """The questions are prepared for a model with fewer positions."""
    flags = [f"--data.{name}=[{finished}/{name}.jsonl]" for name in ("retain", "forget")]
    flags += [f"--data.questions.forget.files=[{finished}/wmdp.jsonl]", "--data.questions.forget.description=x"]
    flags += [
        f"--data.questions.retain.files=[{finished}/mmlu.jsonl]",
        f"--data.questions.retain.examples=[{finished}/dev.jsonl]",
    ]
    flags += [
        "--data.questions.retain.shots=2",
        "--data.kind=text",
        f"--data.tokenizer={finished}/tokenizer",
        "--data.length=128",
    ]
    config = {"model_type": "llama", "max_position_embeddings": 170, **MODEL}
    assert main(["prepare", str(tmp_path / "data"), *flags, f"--model.config={json.dumps(config)}"]) == 0
    splits = read_json(tmp_path / "data" / "manifest.json")["splits"]
    cut = {name: facts["truncated"] for name, facts in splits.items() if "truncated" in facts}
    assert cut["test_retain"] > 0 and cut["test_forget"] == cut["valid_forget"] == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        f"{cut['test_retain']} of {splits['test_retain']['rows']} questions of test_retain are cut" in said
        and "test_forget" not in said
    )
    sequences = Sequences.load(tmp_path / "data" / "data" / "test_retain.safetensors")
    full = Sequences.load(next((finished / "out" / "stages").glob("prepare-*/data")) / "test_retain.safetensors")
    assert sequences.length == 171 < full.length, "as many positions as the model has, and the letter"
