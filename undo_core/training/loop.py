"""The training loop shared by every stage that changes weights by gradient descent."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ParamSpec

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels import release_workspace
from undo_kernels.ops.layout import check_trained

from undo_core import distributed
from undo_core.distributed.dropout import whole_dropout
from undo_core.distributed.sharding import all_finite, release, run
from undo_core.evaluation.metrics import finite
from undo_core.io.progress import StageProgress
from undo_core.io.untrusted import checked, refused
from undo_core.models.adapters import bare, check_adapters
from undo_core.training.batches import Batch, SequenceSource, Source, identity_of
from undo_core.training.config import TrainConfig
from undo_core.training.identity import function_identity, model_identity
from undo_core.training.kept import RESULT, KeptEvaluations
from undo_core.training.log import StageLog
from undo_core.training.memory_savers import choose_kernels, keeps_kernels, lean
from undo_core.training.optimizers import Updater
from undo_core.training.precision import seeded, weight_dtype
from undo_core.training.sharded import check_ranks, sharded
from undo_core.training.training_state import FORMAT, CheckpointWriter, find_training_state, load_training_state

Loss = Callable[[nn.Module, dict[str, Batch], dict[str, int]], torch.Tensor]
"""``loss(model, micro_batches, counted)``: a scalar.

Each term is summed over the labels of its micro-batch and divided by ``counted[source]``, the number of labels in the whole
batch. The gradient is then the same for any split into micro-batches."""

Gradient = Callable[[nn.Module, Loss, dict[str, Batch], dict[str, int], int | None], torch.Tensor]
"""``gradient(model, loss, batches, counted, micro_batch_size)``: computes the gradient of one optimizer step.

It adds the gradient to the parameters' ``grad`` and returns the detached loss."""

Metrics = dict[str, float]
P = ParamSpec("P")

CHECKPOINT_SHARE = 0.05  # largest share of the time that goes into writing checkpoints, however large they are


@dataclass
class TrainResult:
    """Result of a training stage.

    Attributes:
        steps: optimizer steps taken.
        tokens: number of labels read from each source.
        positions: number of positions run through the model for each source, padding included.
        history: metrics of each evaluation, with its ``step`` and the mean training ``loss`` since the previous evaluation.
        stopped: whether the stop rule ended the stage; None without a stop rule.
        seconds: time spent, summed over interrupted and resumed runs, without that in which the stop rule was asked.
    """

    steps: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: bool | None = None
    seconds: float = 0.0

    @property
    def limit_reached(self) -> bool:
        """Whether the stage has a stop rule and used all its steps without satisfying it."""
        return self.stopped is False


class DivergedError(RuntimeError):
    """Raised when the loss or a weight is NaN or infinite."""


@dataclass(frozen=True)
class Wanted:
    """The gradient that a training waits for: the arguments of :data:`Gradient`, with None for the default function, and what
    seeds dropout."""

    gradient: Gradient | None
    model: nn.Module
    loss: Loss
    batches: dict[str, Batch]
    counted: dict[str, int]
    micro_batch_size: int | None
    device: torch.device
    seed: int
    step: int

    def compute(self) -> torch.Tensor:
        """Computes the gradient and returns the detached loss."""
        with seeded(self.device, self.seed, self.step):
            return (self.gradient or accumulate)(self.model, self.loss, self.batches, self.counted, self.micro_batch_size)


Steps = Generator[Wanted, torch.Tensor, TrainResult]
"""A training that stops at each step, until somebody has computed the gradient and sends the loss."""


def driven(steps: Callable[P, Steps]) -> Callable[P, TrainResult]:
    """Decorator that runs a training to its end; its ``steps`` attribute is the training that stops at each step."""

    @functools.wraps(steps)
    def run_alone(*arguments: P.args, **options: P.kwargs) -> TrainResult:
        training = steps(*arguments, **options)
        try:
            wanted = next(training)
            while True:
                try:
                    value = wanted.compute()
                except BaseException as error:
                    training.throw(error)  # leaves its contexts, and raises the error from the step
                    raise
                wanted = training.send(value)
        except StopIteration as end:
            return end.value

    run_alone.steps = steps
    return run_alone


@keeps_kernels
@driven
def train(
    model: nn.Module,
    loss: Loss,
    sources: Mapping[str, Source],
    config: TrainConfig,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    gradient: Gradient | None = None,
    evaluate: Callable[[nn.Module], Metrics] | None = None,
    evaluate_at: Iterable[int] | None = None,
    known_at_start: Metrics | None = None,
    stop: Callable[[Metrics], bool] | None = None,
    stop_known: Callable[[], bool] | None = None,
    must_stay_finite: bool = True,
    folder: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint_seconds: float = 10.0,
    title: str = "training",
    progress: bool = True,
) -> Steps:
    """Trains ``model`` in place.

    Args:
        model: already on its device. Every parameter is converted to ``config.precision`` and to contiguous memory at the
            start; the model is returned in that dtype and in evaluation mode (bfloat16-master drops its float32 masters). The
            attention kernel and activation checkpointing are restored on exit, even after an exception. In a ``PeftModel``,
            only the parameters that require a gradient (the adapters) are trained; frozen parameters keep their dtype and bits.
        loss: see :data:`Loss`. For a ``PeftModel`` it receives the wrapped model.
        sources: for each source name, a function from the step to its batch.
        config: steps, rates, batch sizes.
        parameters: parameters to train; None for every parameter that requires a gradient.
        gradient: see :data:`Gradient`; None for :func:`accumulate`.
        evaluate: called before the first step, after the last, and in between as ``config.eval_every`` or ``evaluate_at`` say.
        evaluate_at: steps at which to evaluate, instead of ``config.eval_every``.
        known_at_start: what ``evaluate`` would return before the first step, if that is known; it is then not called there.
        stop: predicate on the metrics; the stage ends at the first evaluation that satisfies it.
        stop_known: whether ``stop`` can answer without waiting; None if it always can. While it cannot, training goes on and
            keeps the weights of each evaluation in ``folder``, up to 1 GiB. Once it can, training goes back to the first
            evaluation that satisfies it, so the result is the same. Ignored without a ``folder`` and on several ranks, which
            wait for ``stop``.
        must_stay_finite: whether a loss or weight that is not finite raises an error. False lets an attack with too high a
            learning rate finish with the weights it has; its ``history`` holds 3.4e38 for such a loss.
        folder: where ``checkpoint/`` and ``log.jsonl`` are kept, so that a killed stage resumes. A checkpoint is resumed only
            by the same stage; otherwise an error names what differs. The comparison covers ``config``, ``settings``, the model
            as passed in (weights, configuration, trained parameters), the sources (rows, order and seed; every batch of a
            sequence; the first batch of a function), and the code of ``loss``, ``gradient`` and ``stop`` (not the values that
            ``stop`` closes over). An iterable other than a sequence cannot be compared; a warning says so. The comparison
            computes one digest of the weights, about a second per gigabyte in float32. Dropout draws from the device's global
            generator, which is seeded in each step from ``config.seed`` and the step, so a resumed run draws the same.
        settings: further values that decide the result, as JSON values.
        checkpoint_seconds: seconds between checkpoints, or more, so that writing them takes at most 5 % of the time. On several
            ranks one that is due while another is being written is put off until that is published. 0 writes one after every
            step, and so does a negative number, which also waits for the one before.
        title: label of the progress bar.
        progress: whether to show the progress bar.

    Memory: the activations of one micro-batch, and the following bytes for each trained parameter (see
    ``bytes_per_parameter``). A frozen parameter takes only its weight. With ``step_in_backward`` the gradient column is 0, as
    only one gradient exists at a time:

    =====================  ==============  =======  ========  =========  =====
    precision              optimizer       weights  gradient  optimizer  total
    =====================  ==============  =======  ========  =========  =====
    float32                adamw           4        4         8          16
    float32                adamw-8bit      4        4         2.03       10.03
    float32                adamw-4bit      4        4         1.06       9.06
    bfloat16-master        adamw           2        4         4 + 8      18
    bfloat16-master        adamw-8bit      2        4         4 + 2.03   12.03
    bfloat16-master        adamw-4bit      2        4         4 + 1.06   11.06
    bfloat16(-stochastic)  adamw           2        2         4          8
    bfloat16(-stochastic)  adamw-8bit      2        2         2.03       6.03
    bfloat16(-stochastic)  adamw-4bit      2        2         1.06       5.06
    float32                sgd             4        4         4          12
    float32                adafactor       4        4         0          8
    any, on a GPU          adamw-offload   2 or 4   0         0          2 or 4; on the host the rest of adamw and the weights
    =====================  ==============  =======  ========  =========  =====

    Gradients of micro-batches are accumulated in float32 with float32 and bfloat16-master, and in bfloat16 with the other two
    precisions.

    Raises:
        DivergedError: the loss, or a weight after the last step, is NaN or infinite.
        ValueError: no parameter to train, parameters that share memory, or a checkpoint in ``folder`` from a different stage.
        ModuleNotFoundError: the optimizer needs torchao, which is not installed.
    """
    distributed.check_joined()
    outer, model = model, bare(model)
    trained = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not trained:
        raise ValueError(
            "parameters: got none that requires a gradient, wanted at least one; a model that peft has merged is frozen until "
            "requires_grad_()"
        )
    check_trained(model, trained)
    if isinstance(model, PreTrainedModel):
        check_adapters(model, weight_dtype(config.precision))
    folder = None if folder is None else Path(folder)
    at = None if evaluate_at is None else set(evaluate_at)
    device = trained[0].device
    count = distributed.count()
    check_ranks(config, [source.size for source in sources.values() if isinstance(source, SequenceSource)], count)
    made_by = {}
    if folder is not None and distributed.rank() == 0:
        made_by = {
            **asdict(config),
            **_made_of(sources, folder),
            "format": FORMAT,
            "model": model_identity(model, trained),
            "loss": function_identity(loss),
            "gradient": None if gradient is None else function_identity(gradient),
            "stop": None if stop is None else function_identity(stop, values=False),
            "evaluate_at": None if evaluate_at is None else sorted(at),
            **(settings or {}),
        }
    found = None if folder is None else distributed.on_first(lambda: find_training_state(folder / "checkpoint", made_by))
    choose_kernels(model, config)
    if count > 1:
        trained = sharded(model, trained, config)
    updater = Updater(model, trained, config)
    result = TrainResult(tokens=dict.fromkeys(sources, 0), positions=dict.fromkeys(sources, 0))
    total, terms = torch.zeros((), device=device), 0  # training loss since the last evaluation
    if found is not None:
        checkpoint, saved = found
        load_training_state(checkpoint, model, updater)
        with refused(f"{checkpoint}: got a state.json that is not of this version"):
            checked(saved["result"], RESULT, "result")
            result = TrainResult(**saved["result"])
            total, terms = torch.tensor(float(saved["loss_sum"]), device=device), int(saved["loss_count"])
    logs = folder if distributed.rank() == 0 else None
    log = StageLog(logs, -1 if found is None else result.steps)
    kept = None
    if stop is not None and stop_known is not None and folder is not None and count == 1:
        kept = KeptEvaluations(stop, stop_known, model, folder / "kept", result.steps)
    began = last_save = time.monotonic()
    before, pause = result.seconds, checkpoint_seconds
    shown: Metrics = {}

    def stops_earlier() -> bool:
        """Whether an evaluation that was kept satisfies the stop rule; if so, goes back to it."""
        nonlocal result, log
        earlier = None if kept is None else kept.first()
        if earlier is not None:
            result = TrainResult(**earlier)
            log = StageLog(logs, result.steps)
        return earlier is not None

    def evaluate_now() -> bool:
        nonlocal total, terms, shown, began
        outer.eval()
        with torch.no_grad():
            metrics = known_at_start if result.steps == 0 else None
            if metrics is None:
                metrics = {} if evaluate is None else evaluate(outer)
        release(model)
        entry = {"step": result.steps, **({"loss": finite(float(total) / terms)} if terms else {}), **metrics}
        total, terms = torch.zeros((), device=device), 0
        result.history.append(entry)
        log.write({**entry, "tokens": sum(result.tokens.values())})
        shown = metrics
        result.seconds = before + time.monotonic() - began
        if stop is not None:
            asked, result.stopped, last = time.monotonic(), False, result.steps == config.steps
            if (last or kept is None or not kept.keep(vars(result), metrics)) and not stops_earlier():
                result.stopped = distributed.on_first(lambda: stop(metrics))
            began += time.monotonic() - asked  # the rule may have waited for another stage
        return bool(result.stopped)

    def save() -> None:
        if not done:  # else they are those of the evaluation at which it ended
            result.seconds = before + time.monotonic() - began
        state = {"result": vars(result), "loss_sum": finite(float(total)), "loss_count": terms, "made_by": made_by}
        checkpoints.write(result.steps, state)

    with StageProgress(
        title, config.steps, start=result.steps, enabled=progress
    ) as bar:  # before an evaluation, which may take minutes
        done = evaluate_now() if found is None else bool(result.stopped)
        with (
            lean(model, config, count) as tied,
            updater.attached(tied),
            CheckpointWriter(None if folder is None else folder / "checkpoint", model, updater) as checkpoints,
        ):
            while result.steps < config.steps and not done:
                step = result.steps
                batches = {name: source(step).to(device) for name, source in sources.items()}
                counted = {name: batch.counted for name, batch in batches.items()}
                updater.begin(step, config.rate(step))
                outer.train()
                value = yield Wanted(
                    gradient, model, loss, batches, counted, config.micro_batch_size, device, config.seed or 0, step
                )
                updater.step()
                late = time.monotonic() - last_save > pause and (checkpoint_seconds < 0 or not checkpoints.busy)
                if count > 1:  # one reduction for the sum of the losses, and for whether rank 0's clock asks for a checkpoint
                    value, asked = distributed.total(torch.stack([value, value.new_tensor(late and distributed.rank() == 0)]))
                    late = _is_read(device, step) and bool(asked)
                total, terms = total + value, terms + 1
                result.steps += 1
                for name, batch in batches.items():
                    result.tokens[name] += counted[name]
                    result.positions[name] += batch.input_ids.numel()
                due = result.steps in at if at is not None else config.eval_every and result.steps % config.eval_every == 0
                due = due or result.steps == config.steps
                loss_now = float(value) if _is_read(device, step) else None
                seen = float(total) if due else loss_now  # the sum includes the losses that were not read in their own step
                if must_stay_finite and seen is not None and not abs(seen) < float("inf"):
                    if stops_earlier():
                        break
                    raise DivergedError(
                        f"{title}: the loss is {seen} by step {result.steps} (lr {config.rate(step):g}); lower lr"
                    )
                bar.update(result.steps, sum(counted.values()), loss_now, shown)
                if due:
                    done = evaluate_now()
                if late:
                    asked_at = time.monotonic()
                    save()
                    last_save = time.monotonic()
                    if checkpoint_seconds > 0:
                        pause = max(checkpoint_seconds, (last_save - asked_at) / CHECKPOINT_SHARE)
    outer.eval()
    release_workspace()  # the memory of the gradients, which no later step needs
    # No later loss would reveal that the last step made a weight non-finite.
    if must_stay_finite and not all_finite(trained):
        raise DivergedError(f"{title}: weights are not finite after step {result.steps}; lower lr")
    return result


def _made_of(sources: Mapping[str, Source], folder: Path) -> dict[str, Any]:
    """Returns the identities of the sources; warns about each source without one."""
    identities = {name: identity_of(source) for name, source in sources.items()}
    for name, identity in identities.items():
        if identity is None:
            warnings.warn(
                f"{name}: got an iterable, whose batches cannot be compared with those of an earlier run in {folder}; a list "
                "of batches or token sequences can",
                stacklevel=3,
            )
    return {"sources": identities}


def accumulate(
    model: nn.Module, loss: Loss, batches: dict[str, Batch], counted: dict[str, int], micro_batch_size: int | None
) -> torch.Tensor:
    """Runs the backward pass of every micro-batch; returns the detached loss of the whole batch."""
    size = micro_batch_size or max(len(batch.input_ids) for batch in batches.values())
    parts = {name: batch.split(size) for name, batch in batches.items()}
    value = None
    for index in range(max(len(part) for part in parts.values())):
        whole = {name: part[index] for name, part in parts.items() if index < len(part)}
        micro = {name: part.share() for name, part in whole.items()}
        with whole_dropout(model, (len(part.input_ids) for part in whole.values())):
            term = run(model, loss, micro, counted)
            term.backward()
        value = term.detach() if value is None else value + term.detach()
    return value


def _is_read(device: torch.device, step: int) -> bool:
    """Whether the loss of this step is read on the host; on a GPU that waits for the device, so only every tenth is."""
    return device.type == "cpu" or step % 10 == 0
