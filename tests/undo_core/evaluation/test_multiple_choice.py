"""Multiple choice: scores equal those of transformers' logits and of lm-eval for any batches; files, prompts, the command."""

import copy
import importlib.util
import json

import pytest
import torch
from generated_questions import bytewise_tokenizer, questions, write
from rounding import PATH, assert_same_function, gamma

from undo_core.cli import main
from undo_core.data.questions import DESCRIPTION, Question, prompts, read_questions
from undo_core.evaluation.multiple_choice import MultipleChoiceConfig, encode, log_likelihoods
from undo_core.models import build_model

MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 400,
}


@pytest.fixture(scope="module")
def bytewise():
    return bytewise_tokenizer()


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def model(request, bytewise):
    made = build_model({"model_type": request.param, **MODEL}, bytewise, 0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(12)  # answers that differ
    return made


def naive(model, request):
    """Scores one request from the model's own logits in float64."""
    given, asked = request
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*given, *asked]])).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(given) - 1 + at, token]) for at, token in enumerate(asked))


def test_log_likelihoods_are_those_of_the_models_own_logits(model, bytewise):
    requests = [
        encode(bytewise, question.prompt(), f" {text}")
        for question in questions(6)
        for text in ("A", "B", "C", question.choices[0])
    ]
    assert {len(asked) for _, asked in requests} > {1}
    plain, wanted = (
        torch.tensor([naive(one, request) for request in requests], dtype=torch.float64)
        for one in (model, copy.deepcopy(model).double())
    )
    model.train()
    for positions in (1, 300, 16_384):
        assert_same_function(log_likelihoods(model, requests, positions=positions), plain, wanted)
    assert model.training


def test_letters_share_a_pass_and_the_head_sees_the_answers_alone(model, bytewise, monkeypatch):
    import undo_core.evaluation.multiple_choice as module

    sequences, scored = [], []
    forward, cross_entropy = module.hidden_states, module.linear_cross_entropy
    monkeypatch.setattr(module, "hidden_states", lambda model, ids: sequences.append(tuple(ids.shape)) or forward(model, ids))
    monkeypatch.setattr(
        module,
        "linear_cross_entropy",
        lambda hidden, *a, **k: scored.append(hidden.shape[0]) or cross_entropy(hidden, *a, **k),
    )
    requests = [encode(bytewise, question.prompt(), f" {letter}") for question in questions(10) for letter in "ABCD"]
    log_likelihoods(model, requests, positions=120)
    assert sum(count for count, _ in sequences) == 10 and sum(scored) == 40
    assert all(count * length <= 120 or count == 1 for count, length in sequences) and len(sequences) > 1
    lengths = [length for _, length in sequences]
    assert lengths == sorted(lengths, reverse=True)


def test_the_prompt_is_that_of_the_published_tasks():
    asked = Question(" Which one? ", ("a", "b", "c", "d"), 2, "high_school_biology")
    shown = [Question("First?", ("w", "x", "y", "z"), 3, "high_school_biology"), Question("Other?", ("p", "q"), 0, "x")]
    assert prompts([asked], shown, shots=1, description=DESCRIPTION) == [
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "First?\nA. w\nB. x\nC. y\nD. z\nAnswer: D\n\n"
        "Which one?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    ]
    with pytest.raises(ValueError, match=r"^shots: got 2 and 1 examples of the subject 'high_school_biology'"):
        prompts([asked], shown, shots=2)


def test_files_and_the_command(model, bytewise, tmp_path, capsys):
    asked = questions(24)
    path = write(tmp_path / "q.jsonl", asked)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([vars(question) for question in asked]), tmp_path / "q.parquet")
    assert read_questions([path]) == asked == read_questions([tmp_path / "q.parquet"])
    model.save_pretrained(tmp_path / "model")
    bytewise.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "model"), "--multiple-choice", path, "--limit=0.5"]) == 0
    got = json.loads(capsys.readouterr().out)["multiple_choice"]
    right = {}
    for question in asked:
        kept = right.setdefault(question.subject, [])
        (text,) = prompts([question], description=DESCRIPTION)
        scores = [naive(model.eval(), encode(bytewise, text, f" {letter}")) for letter in "ABCD"]
        kept.append(scores.index(max(scores)) == question.answer)
    kept = {subject: of[: -(-len(of) // 2)] for subject, of in right.items()}
    everything = [entry for of in kept.values() for entry in of]
    assert got["value"] == pytest.approx(sum(everything) / len(everything)) and got["n"] == len(everything)
    assert got["low"] < got["value"] < got["high"] and got["truncated"] == 0
    assert {name: group["value"] for name, group in got["groups"].items()} == {
        n: pytest.approx(sum(k) / len(k)) for n, k in kept.items()
    }


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: got list"),
        ('{"question": "", "choices": ["a", "b"], "answer": 0}', "line 2: got the question ''"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 2: got the choices"),
        (
            '{"question": "q", "choices": ["a", "b"], "answer": 2}',
            "line 2: got the answer 2, wanted the index of a choice, below 2",
        ),
    ],
)
def test_bad_records_are_named(tmp_path, record, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(vars(questions(1)[0])) + "\n" + record + "\n")
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_questions([path])


def test_bad_settings(tmp_path, capsys):
    for settings, name in (({"files": []}, "multiple_choice"), ({"shots": 1}, "shots"), ({"limit": 0.0}, "limit")):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            MultipleChoiceConfig(**{"files": ["q.jsonl"], **settings})
    with pytest.raises(FileNotFoundError, match=r"^multiple_choice: got none.jsonl"):
        read_questions(["none.jsonl"])


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="NOT COMPARED WITH lm-eval: pip install 'undo-core[lm-eval]'"
)
@pytest.mark.parametrize("shots", [0, 3])
def test_lm_eval_gives_the_same(model, bytewise, tmp_path, shots):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked, shown = questions(30, seed=3), questions(12, seed=4)
    judge = HFLM(pretrained=model, tokenizer=bytewise, batch_size=4, device="cpu")
    texts = prompts(asked, shown, shots=shots, description=DESCRIPTION)
    pairs = [(text, f" {letter}") for text in texts for letter in "ABCD"]
    wanted = judge.loglikelihood([Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)])
    got = log_likelihoods(model, [encode(bytewise, *pair) for pair in pairs])
    torch.testing.assert_close(
        got, torch.tensor([score for score, _ in wanted], dtype=torch.float64), rtol=2 * gamma(PATH), atol=0
    )
    assert got.std() > 0.1
