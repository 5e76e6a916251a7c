import pytest
import torch

from undo_core.data.sequences import Sequences


def test_every_epoch_reads_every_sequence_once():
    sequences = Sequences(torch.arange(20).view(10, 2), pad_id=-1)
    for size in (1, 3, 10, 25):
        read = torch.cat([sequences.batch(step, size, seed=3) for step in range(-(-40 // size))])[:40, 0].view(4, 10) // 2
        for epoch in read:
            assert sorted(epoch.tolist()) == list(range(10))
        assert read[0].tolist() != read[1].tolist()


def test_order_is_a_function_of_seed_and_step():
    sequences = Sequences(torch.arange(200).view(100, 2), pad_id=-1)
    forward = [sequences.batch(step, 7, seed=1) for step in range(30)]
    backward = [sequences.batch(step, 7, seed=1) for step in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(forward[0], sequences.batch(0, 7, seed=2))


def test_saved_sequences_come_back(tmp_path):
    sequences = Sequences(
        torch.tensor([[1, 2, 0], [1, 3, 4]]), 0, torch.tensor([[0, 1, 0], [0, 1, 1]]).bool(), torch.tensor([0, 1]), ("+", "-")
    )
    sequences.save(tmp_path / "sequences.safetensors")
    back = Sequences.load(tmp_path / "sequences.safetensors")
    assert torch.equal(back.input_ids, sequences.input_ids.int()) and torch.equal(back.answer_mask, sequences.answer_mask)
    assert back.group.tolist() == [0, 1] and back.group_names == ("+", "-") and back.pad_id == 0 and back.tokens() == 5


def test_what_is_no_sequences_file_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: not a file of token sequences"):
        Sequences.load(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="input_ids: got shape"):
        Sequences(torch.zeros(0, 3), 0)
    with pytest.raises(ValueError, match="answer_mask: got shape"):
        Sequences(torch.zeros(2, 3), 0, torch.zeros(2, 2))


def test_distinct_sequences_keep_their_order_and_differ_in_some_column():
    ids = torch.tensor([[5, 6], [3, 4], [5, 6], [5, 6], [3, 4]])
    mask = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1], [0, 1]]).bool()
    distinct, of = Sequences(ids, 0, mask, torch.tensor([0, 1, 1, 0, 0]), ("a", "b")).distinct()
    assert distinct.input_ids.tolist() == [[5, 6], [3, 4], [5, 6]] and of.tolist() == [0, 1, 0, 2, 1]
    assert distinct.answer_mask.tolist() == [[False, True], [False, True], [True, True]]
