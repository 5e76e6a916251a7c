"""The place of the teacher does not change the student: streamed and cached against resident; and what a cache refuses."""

import copy
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from file_hashes import weight_hashes

from undo_core import distill
from undo_core.data.sequences import Sequences
from undo_core.distillation import cache_writer
from undo_core.distillation.cache import CachedTeacher, cache_teacher
from undo_core.distillation.streaming import WeightReader, load_head, stream_model, weights_digest
from undo_core.distillation.teacher import ModelTeacher, TeacherConfig
from undo_core.io.files import read_json
from undo_core.models import build_model, head_of, load_model
from undo_core.training import TrainConfig, sequence_source

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
CACHED = TeacherConfig("cached", batch_size=16)


@pytest.fixture(params=["gemma2", "llama"])
def pair(request, tiny, tokenizer, tmp_path):
    """Returns a teacher with weights that are not small, its folder, and a student."""
    make = tiny if request.param == "gemma2" else lambda seed=0: build_model(LLAMA, tokenizer, seed)
    with torch.no_grad():
        made = make(1)
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    made.save_pretrained(tmp_path / "teacher")
    return load_model(tmp_path / "teacher"), tmp_path / "teacher", lambda: make(2)


def learn(teacher, student, sequences, steps=4, **options):
    train = TrainConfig(steps=steps, batch_size=32, micro_batch_size=16, lr=3e-3)
    result = distill(student, teacher, sequences, train, progress=False, **options)
    return torch.cat([p.detach().flatten() for p in student.parameters()]), result


def test_the_student_has_the_same_bits(pair, sequences, tmp_path):
    model, folder, student = pair
    wanted, facts = learn(model, student(), sequences)
    got, other = learn(ModelTeacher.streamed(folder), student(), sequences)
    assert torch.equal(got, wanted) and other.history == facts.history

    cache_teacher(stream_model(folder), sequences, tmp_path / "cache", CACHED, progress=False)
    for head in (folder, model, head_of(model)):
        cached = CachedTeacher.open(tmp_path / "cache", head, CACHED)
        got, other = learn(cached, student(), sequences)
        assert torch.equal(got, wanted) and other.history == facts.history
    assert not torch.equal(wanted, torch.cat([p.detach().flatten() for p in student().parameters()]))


def test_a_streamed_model_keeps_no_layer(pair):
    model, folder, _ = pair
    streamed = stream_model(folder)
    ids, live = torch.arange(1, 13).view(2, 6), []
    layers = streamed.base_model.layers
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: live.append([not next(part.parameters()).is_meta for part in layers]))
    with torch.no_grad():
        assert torch.equal(streamed(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert live == [[i == j for j in range(len(layers))] for i in range(len(layers))]
    assert all(p.is_meta for p in layers.parameters()) and not streamed.get_input_embeddings().weight.is_meta
    assert weights_digest(streamed) == weights_digest(model) == WeightReader(folder).digest()
    head, wanted = load_head(WeightReader(folder)), head_of(model)
    assert torch.equal(head.weight, wanted.weight) and (head.scale, head.softcap) == (wanted.scale, wanted.softcap)


def test_a_bfloat16_cache_is_close_and_says_how_close(pair, sequences, tmp_path):
    model, _, student = pair
    _, exact = learn(model, student(), sequences, steps=1)
    config = TeacherConfig("cached", dtype="bfloat16", batch_size=16)
    cached = cache_teacher(model, sequences, tmp_path / "cache", config, progress=False)
    loss = learn(cached, student(), sequences, steps=1)[1].history[-1]["loss"]
    assert loss == pytest.approx(exact.history[-1]["loss"], rel=1e-2) and loss != exact.history[-1]["loss"]
    far = cached.facts["error"]["far from"]
    assert 0 < far["kl_error"] < 1e-2 and 0 < far["gradient_error"] < 2e-2
    assert cached.targets(first_batch(sequences)).hidden.dtype == torch.float32


def first_batch(sequences, size=16):
    return sequence_source(sequences, size, 0)(0)


def test_the_error_of_the_top_k_falls_with_k(pair, sequences, tmp_path):
    model, _, student = pair
    errors = []
    for k in (1, 4, 12):
        cached = cache_teacher(model, sequences, tmp_path / f"{k}", TeacherConfig("topk", k=k, batch_size=16), progress=False)
        errors.append([cached.facts["error"]["far from"][name] for name in ("kl_error", "gradient_error")])
    assert errors[0] > errors[1] > errors[2] and errors[0][1] > errors[1][1] > errors[2][1]
    assert errors[2][0] < 0.5 * errors[0][0] and errors[2][0] < 0.2
    opened = CachedTeacher.open(tmp_path / "12")
    assert opened.head is None and opened.vocabulary == 17
    before, after = student(), student()
    approximate = learn(opened, after, sequences)[1].history[-1]["loss"]
    assert approximate == pytest.approx(learn(model, before, sequences)[1].history[-1]["loss"], rel=0.1)
    with pytest.raises(ValueError, match=r"^k: got 17, wanted less than the vocabulary's 17"):
        cache_teacher(model, sequences, tmp_path / "all", TeacherConfig("topk", k=17), progress=False)


def test_the_head_is_cast_once_for_all_chunks_of_logits(tiny, sequences, monkeypatch):
    model = tiny(1).bfloat16()
    hidden = torch.randn(12, 16, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    whole = cache_writer.stored_form(hidden, head_of(model), TeacherConfig("topk", k=4))
    monkeypatch.setattr(cache_writer, "LOGIT_BYTES", 4 * 17 * 2)  # two tokens at a time

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        casts, products = 0, 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            self.products += function is torch.ops.aten.mm.default
            self.casts += function is torch.ops.aten._to_copy.default and arguments[0].shape == (17, 16)
            return function(*arguments, **(keywords or {}))

    with torch.no_grad(), Watch() as watch:
        parts = cache_writer.stored_form(hidden, head_of(model), TeacherConfig("topk", k=4))
    assert watch.products == 6 and watch.casts == 1
    assert torch.equal(parts["indices"], whole["indices"])


@pytest.fixture
def cache(tiny, sequences, tmp_path):
    tiny(1).save_pretrained(tmp_path / "teacher")
    cache_teacher(tiny(1), sequences, tmp_path / "cache", CACHED, progress=False)
    return tmp_path / "cache"


def test_a_mismatch_is_refused(cache, tiny, sequences, tmp_path):
    longer = Sequences(torch.nn.functional.pad(sequences.input_ids, (0, 2)), 0)
    other = Sequences(sequences.input_ids.flip(0), 0)
    tiny(2).save_pretrained(tmp_path / "other")
    half = copy.deepcopy(tiny(1)).bfloat16()
    for argument, message in (
        (tmp_path / "other", "another teacher's weights"),
        (tiny(2), "another teacher's weights"),
        (head_of(tiny(2)), "another head"),
        (half, "another teacher's weights"),
        (None, "^head: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedTeacher.open(cache, argument)
    for config, message in (
        (TeacherConfig("cached", dtype="bfloat16"), "dtype float32; .* dtype bfloat16"),
        (TeacherConfig("topk"), "kind cached; .* kind topk"),
        (TeacherConfig("cached", batch_size=8), "batch_size 16; .* batch_size 8"),
    ):
        with pytest.raises(ValueError, match=message):
            CachedTeacher.open(cache, tiny(1), config)
    with pytest.raises(FileNotFoundError, match=r"^cache: got .*, which has no cache.json"):
        CachedTeacher.open(tmp_path / "other", tiny(1))
    teacher, before = CachedTeacher.open(cache, tmp_path / "teacher"), tiny(2)
    for data, message in (
        (longer, "length 8; .* length 10"),
        (other, "other sequences"),
        ([sequences.input_ids.long()], "^text: got list, wanted the token sequences"),
        (lambda step: None, "^text: got function, wanted the token sequences"),
    ):
        student = tiny(2)
        with pytest.raises(ValueError, match=message):
            learn(teacher, student, data)
        assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before.parameters(), strict=True))
    assert CachedTeacher.open(cache, tiny(1), TeacherConfig("cached")).kind == "cached"
    others = (TeacherConfig("topk", k=2), TeacherConfig("cached", batch_size=8), TeacherConfig("cached"))
    for different in (
        (tiny(2), sequences, CACHED),
        (tiny(1), other, CACHED),
        *((tiny(1), sequences, config) for config in others),
    ):
        with pytest.raises(ValueError, match=r"^folder: got .*, a cache"):
            cache_teacher(*different[:2], cache, different[2], progress=False)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_killed_while_caching_it_continues(cache, tiny, sequences, tmp_path, seconds, monkeypatch):
    small = {"shard_bytes": 20_000, "checkpoint_seconds": seconds, "progress": False}  # shards of about fifty sequences
    teacher, whole, killed = tiny(1), tmp_path / "whole", tmp_path / "killed"
    config = TeacherConfig("cached", batch_size=8)
    cache_teacher(teacher, sequences, whole, config, **small)
    assert len(weight_hashes(whole)) == 3

    import undo_core.distillation.cache_writer as module

    forward, calls = module.hidden_states, 0

    def dying(*arguments):
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(module, "hidden_states", dying)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, sequences, killed, config, **small)
    with pytest.raises(FileNotFoundError, match="wanted a complete cache"):
        CachedTeacher.open(killed, teacher)
    state = read_json(killed / "progress.json")
    done, first = state["rows"], state["bounds"][1]
    assert done > first if seconds == 0.0 else done == first, "the second shard is continued within, or begun again"
    with pytest.raises(ValueError, match="an unfinished cache with another teacher's weights"):
        cache_teacher(tiny(3), sequences, killed, config, **small)
    before = calls = 100
    cache_teacher(teacher, sequences, killed, config, **small)
    assert calls - before == sum(-(-(end - max(start, done)) // 8) for start, end in pairwise(state["bounds"]) if end > done), (
        "what was done is not done again"
    )
    assert weight_hashes(killed) == weight_hashes(whole) and {p.name for p in killed.iterdir()} == {
        *weight_hashes(whole),
        "cache.json",
    }
    calls = 100
    cache_teacher(teacher, sequences, killed, config, **small)
    assert calls == 100
    one = learn(CachedTeacher.open(killed, teacher), tiny(2), sequences)[0]
    assert torch.equal(one, learn(CachedTeacher.open(whole, teacher), tiny(2), sequences)[0])


def test_killed_between_a_file_and_its_record_or_with_other_sizes(tiny, sequences, tmp_path, monkeypatch):
    import undo_core.distillation.cache_writer as module

    small = {"shard_bytes": 20_000, "checkpoint_seconds": 0.0, "progress": False}
    config, folder = TeacherConfig("cached", batch_size=8), tmp_path / "killed"
    cache_teacher(tiny(1), sequences, tmp_path / "whole", config, **small)

    def dying(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "sync_folder", dying)
        cache_teacher(tiny(1), sequences, folder, config, **small)
    shutil.copytree(folder, tmp_path / "resized")
    cache_teacher(tiny(1), sequences, folder, config, **small)
    assert weight_hashes(folder) == weight_hashes(tmp_path / "whole")
    cache_teacher(tiny(1), sequences, tmp_path / "resized", config, **{**small, "shard_bytes": 19_000})
    assert len(weight_hashes(tmp_path / "resized")) == 3 and weight_hashes(tmp_path / "resized") != weight_hashes(folder)
    students = [learn(CachedTeacher.open(tmp_path / name, tiny(1)), tiny(2), sequences)[0] for name in ("killed", "resized")]
    assert torch.equal(*students)


def test_killed_while_shards_of_another_size_are_removed(tiny, sequences, tmp_path, monkeypatch):
    """Whichever size the next call has, it takes no shard for stored that is gone."""
    options = {"checkpoint_seconds": 0.0, "progress": False, "config": TeacherConfig("cached", batch_size=8)}
    folder, unlink, removed = tmp_path / "cache", Path.unlink, []

    def killed(*_):
        raise KeyboardInterrupt

    def killed_after_one(path, **options):
        if removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    for size in (20_000, 19_000):
        shutil.rmtree(folder, ignore_errors=True)
        removed.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("undo_core.distillation.cache.write_json", killed)  # when all shards are there
            cache_teacher(tiny(1), sequences, folder, shard_bytes=20_000, **options)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "unlink", killed_after_one)
            cache_teacher(tiny(1), sequences, folder, shard_bytes=19_000, **options)
        cache_teacher(tiny(1), sequences, folder, shard_bytes=size, **options)
        whole = tmp_path / f"whole-{size}"
        cache_teacher(tiny(1), sequences, whole, shard_bytes=size, **options)
        assert weight_hashes(folder) == weight_hashes(whole)


def test_a_kill_between_a_cache_and_the_end_of_its_record(tiny, sequences, tmp_path):
    cache_teacher(tiny(1), sequences, tmp_path, CACHED, progress=False)
    files = sorted(path.name for path in tmp_path.iterdir())
    (tmp_path / "progress.json").write_text("{}")
    cache_teacher(tiny(1), sequences, tmp_path, CACHED, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_a_full_disk_is_one_line(tiny, sequences, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    positions = int((sequences.input_ids[:, 1:] != 0).sum())
    with pytest.raises(
        OSError, match=rf"needs [\d,]+ bytes \({positions} positions of 68\) and the disk has 1,000 free"
    ) as info:
        cache_teacher(tiny(1), sequences, tmp_path / "cache", CACHED, progress=False)
    assert "\n" not in str(info.value) and not list((tmp_path / "cache").iterdir())
    monkeypatch.undo()
    import undo_core.distillation.cache_writer as module

    write, left = module.os.pwrite, [3]

    def full(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(module.os, "pwrite", full)
    with pytest.raises(OSError, match=r"the disk is full; the teacher's cache takes [\d,]+ bytes in all"):
        cache_teacher(tiny(1), sequences, tmp_path / "cache", CACHED, progress=False)
    left[0] = 10**6
    cache_teacher(tiny(1), sequences, tmp_path / "cache", CACHED, progress=False)


def test_a_resumed_distillation_has_the_same_bits(cache, tiny, sequences, tmp_path):
    teacher = CachedTeacher.open(cache, tmp_path / "teacher")
    wanted, _ = learn(teacher, tiny(2), sequences, steps=6)

    class Dying(CachedTeacher):
        calls = 0

        def targets(self, batch):
            self.calls += 1
            if self.calls == 7:
                raise KeyboardInterrupt
            return super().targets(batch)

    options = {"folder": tmp_path / "scratch", "checkpoint_seconds": 0.0}
    options["folder"].mkdir()
    with pytest.raises(KeyboardInterrupt):
        learn(Dying(cache, teacher.head), tiny(2), sequences, steps=6, **options)
    assert torch.equal(
        learn(CachedTeacher.open(cache, tmp_path / "teacher"), tiny(2), sequences, steps=6, **options)[0], wanted
    )


def test_the_padding_token_within_a_text_is_stored_like_any_other(tiny, sequences, tmp_path):
    ids = sequences.input_ids.clone()
    ids[:, 3] = 0  # as if one id were both padding and the end of a text
    both = Sequences(ids, 0, lengths=sequences.lengths)
    cached = cache_teacher(tiny(1), both, tmp_path / "cache", CACHED, progress=False)
    assert cached.facts["positions"] == int((sequences.input_ids[:, 1:] != 0).sum())
    assert torch.equal(learn(cached, tiny(2), both)[0], learn(tiny(1), tiny(2), both)[0])
