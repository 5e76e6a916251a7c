"""A new unlearning method in one file: ascend on the forget text only where the model is still better than a bound.

A method is a function from the original model and the configuration to a Method. In undo_core/unlearning/ this file needs no
further registration: it is found there, gets its own settings (`settings=` names their dataclass), and appears in
`undo run --help`.
"""

import tiny

from undo_core import TrainConfig, UnlearnConfig, unlearn
from undo_core.training.losses import cross_entropy
from undo_core.unlearning.method import Method, forget_and_retain, register

BOUND = 6.0  # nats per token; text that is already this unlikely has no further ascent


@register("bounded", "Bounded ascent")
def bounded(model, config: UnlearnConfig) -> Method:
    """``-min(CE(forget), BOUND) + retain_weight * CE(retain)``."""

    def ascent(model, batch, counted):
        loss = cross_entropy(model, batch, counted)  # of a micro-batch, over the labels of the whole batch: the shares add up
        return -loss.clamp(max=BOUND * batch.counted / counted)

    return Method(forget_and_retain(ascent, model, config))


def main(steps: int = 30) -> dict[str, float]:
    model, forget, retain = tiny.model(), [tiny.batch(0)], [tiny.batch(1)]
    before = {name: model(**batch[0]).loss.item() for name, batch in (("forget", forget), ("retain", retain))}
    settings = UnlearnConfig(method="bounded", train=TrainConfig(steps=steps, batch_size=4, lr=3e-3))
    unlearn(model, forget=forget, retain=retain, config=settings, progress=False)
    after = {name: model(**batch[0]).loss.item() for name, batch in (("forget", forget), ("retain", retain))}
    for name in before:
        print(f"{name}: cross-entropy {before[name]:.3f} before, {after[name]:.3f} after")
    return {name: after[name] - before[name] for name in before}


if __name__ == "__main__":
    main()
