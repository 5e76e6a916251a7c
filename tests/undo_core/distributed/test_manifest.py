"""The manifest of a stage that two ranks trained predicts the memory of one of them, with the predictor of ``undo plan --ranks 2``."""

from ranks import on_ranks
from tiny_run import RUN
from transformers import AutoConfig

from undo_core import distributed
from undo_core.data.config import DataConfig
from undo_core.models.config import ModelConfig
from undo_core.pipeline.config import PretrainConfig, RunConfig
from undo_core.pipeline.graph import graph_of
from undo_core.pipeline.memory.predictor import Predictor
from undo_core.pipeline.prepared import load_split
from undo_core.pipeline.store import Store
from undo_core.pipeline.workers import use_threads
from undo_core.training import TrainConfig


def config(folder):
    shape = {**RUN["model"]["config"], "hidden_size": 64, "num_hidden_layers": 2}
    train = TrainConfig(steps=1, batch_size=4)
    data = DataConfig(kind="arithmetic-compact", train_rows=200, eval_prompts=4)
    return RunConfig(
        name="tiny", output=str(folder), data=data, model=ModelConfig(config=shape), pretrain=PretrainConfig(train=train)
    )


def built(folder):
    """Builds the pretrained model; returns its manifest."""
    use_threads(1)
    store, stage = Store(folder / str(distributed.count())), pretrained(folder)
    store.ensure(stage)
    return store.manifest(stage)


def pretrained(folder):
    return next(stage for stage in graph_of(config(folder)).stages() if stage.kind == "pretrain")


def test_the_memory_of_a_rank_is_predicted(tmp_path):
    found = on_ranks(2, built, tmp_path)
    assert found[0] == found[1]
    manifests = [built(tmp_path), found[0]]
    assert [manifest.get("ranks") for manifest in manifests] == [None, 2]
    store, stage = Store(tmp_path / "2"), pretrained(tmp_path)
    scored = load_split(store.folder(stage.prepared), "valid_retain")
    given = (AutoConfig.from_pretrained(store.folder(stage)), scored.length)
    predicted = [Predictor(*given, answers=True, evaluated=len(scored), ranks=ranks)(stage).total for ranks in (1, 2)]
    assert [manifest["predicted_bytes"] for manifest in manifests] == predicted
    assert predicted[0] != predicted[1]
