"""The one training loop. It knows rows, losses and steps, and nothing of any method."""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from lightning.fabric import Fabric

from litpeft.data.batches import Batch, collate, plan_steps
from litpeft.data.tokenise import Row
from litpeft.errors import INTERRUPTED, STOPPED, UserError
from litpeft.evaluate import mean_loss, summed_loss
from litpeft.methods.base import trainable
from litpeft.settings.train import Finetune, Train
from litpeft.train.log import Log, StepRecord
from litpeft.train.optim import lr_at

DONE = "all steps done"


@dataclass
class Progress:
    """Where a run is and what it has seen."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # spent in optimizer steps
    losses: list[float] = field(default_factory=list)  # nats per trained token, one a step
    validations: list[tuple[int, float]] = field(default_factory=list)  # step, nats per trained token
    stopped: str = DONE
    exit_code: int = 0


def total_steps(rows: int, train: Train) -> int:
    """Returns the optimizer steps of a run; the last step of an epoch takes the rows that are left."""
    steps = train.epochs * -(-rows // train.batch_size)
    return steps if train.max_steps is None else min(steps, train.max_steps)


def fit(
    fabric: Fabric,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: list[Row],
    held_out: list[Row],
    settings: Finetune,
    log: Log,
    sample: Callable[[int], None],
) -> Progress:
    """Trains to the end of the run; `sample(step)` shows an answer at each measurement on the held-out rows."""
    train, validation = settings.train, settings.validation
    steps = total_steps(len(rows), train)
    interval = validation.interval or max(1, steps // 10)
    progress, start = Progress(), time.perf_counter()

    def measure() -> None:
        if held_out:
            measured = held_out[: validation.max_rows]
            loss = mean_loss(model, measured, train.micro_tokens, fabric.device)
            if not math.isfinite(loss):
                what = f"the validation loss is {loss} after step {progress.step}: nothing more is trained or saved"
                raise UserError("NUMERIC-002", what, hint="lower train.lr, or choose another base.precision")
            progress.validations.append((progress.step, loss))
            log.validation(progress.step, loss, sum(sum(row.trained) for row in measured))
            sample(progress.step)

    model.train()
    measure()
    with stop_on_signal(log) as asked:
        for micro_batches in steps_of_rows(rows, settings, steps, progress):
            batches = [collate([rows[i] for i in numbers]).to(fabric.device) for numbers in micro_batches]
            lr = lr_at(progress.step, steps, train)
            began = time.perf_counter()
            loss, norm = train_step(fabric, model, optimizer, batches, lr, train.max_norm, progress.step + 1)
            now = time.perf_counter()
            log.step(record(progress, batches, loss, lr, norm, now - began, now - start))
            if asked:
                progress.stopped = f"{asked[0]} at step {progress.step} of {steps}"
                progress.exit_code = INTERRUPTED if asked[0] == "SIGINT" else STOPPED
            elif train.max_time is not None and now - start >= 60 * train.max_time:
                progress.stopped = f"max_time reached at step {progress.step} of {steps}"
            if progress.stopped != DONE or progress.step == steps or progress.step % interval == 0:
                measure()
            if progress.stopped != DONE:
                break
    return progress


def steps_of_rows(rows: list[Row], settings: Finetune, steps: int, progress: Progress) -> Iterator[list[list[int]]]:
    """Yields each optimizer step of the run as its micro-batches of row numbers."""
    data, train = settings.data, settings.train
    left = steps
    for epoch in range(train.epochs):
        plan = plan_steps(
            rows, train.batch_size, train.micro_tokens, train.micro_batch_size, data.packing, epoch, data.seed
        )
        progress.epoch = epoch
        yield from plan[:left]
        left -= len(plan)
        if left <= 0:
            return


def train_step(
    fabric: Fabric,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Batch],
    lr: float,
    max_norm: float | None,
    step: int,
) -> tuple[float, float]:
    """Takes optimizer step `step`; returns the loss in nats per trained token and the norm of its gradient.

    The loss is the sum over the trained tokens of all micro-batches, divided by their number: how the rows of a step
    are spread over micro-batches changes nothing.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    tokens = sum(len(batch.targets) for batch in batches)
    sums = []
    for batch in batches:
        loss = summed_loss(model, batch)
        fabric.backward(loss / tokens)
        sums.append(loss.detach())
    norm = fabric.clip_gradients(model, optimizer, max_norm=max_norm or float("inf"), error_if_nonfinite=False)
    total = torch.stack(sums)
    if not torch.isfinite(total.sum()) or not torch.isfinite(norm):
        refuse_nonfinite(fabric, model, batches, total, step)
    optimizer.step()
    optimizer.zero_grad()
    return float(total.sum()) / tokens, float(norm)


def refuse_nonfinite(
    fabric: Fabric, model: torch.nn.Module, batches: list[Batch], sums: torch.Tensor, step: int
) -> None:
    """Raises, naming the rows whose loss is not finite, or the first gradient that is not.

    A gradient that overflows in float16 is no error: the scaler of 16-mixed skips that step and lowers its scale.
    """
    rows = [source for batch, ok in zip(batches, sums.isfinite(), strict=True) if not ok for source in batch.sources]
    if not rows and getattr(fabric.strategy.precision, "scaler", None) is not None:
        return
    bad = [n for n, p in trainable(model).items() if p.grad is not None and not p.grad.isfinite().all()]
    gradient = f"the gradient of {bad[0]}" if bad else "the norm of the gradient"
    what = f"the loss of rows {', '.join(rows[:8])}" if rows else gradient
    hint = "nothing of this step was taken; lower train.lr, or choose another base.precision"
    raise UserError("NUMERIC-001", f"step {step}: {what} is not finite", hint=hint)


def record(
    progress: Progress, batches: list[Batch], loss: float, lr: float, norm: float, took: float, seconds: float
) -> StepRecord:
    """Counts a step in and returns its figures; `took` and `seconds` are the step's and the run's time."""
    tokens = sum(batch.tokens for batch in batches)
    progress.step += 1
    progress.tokens += tokens
    progress.trained_tokens += sum(len(batch.targets) for batch in batches)
    progress.losses.append(loss)
    progress.seconds += took
    return StepRecord(
        step=progress.step,
        epoch=progress.epoch,
        loss=loss,
        lr=lr,
        grad_norm=norm,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        tokens_per_second=tokens / took,
        seconds=seconds,
    )


@contextmanager
def stop_on_signal(log: Log) -> Iterator[list[str]]:
    """Yields a list that a signal fills with its name, so that the loop can end after its step.

    A second Ctrl-C ends the program at once.
    """
    asked: list[str] = []

    def ask(number: int, frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        log.message(f"{asked[0]}: stopping after this step, then saving; Ctrl-C now would throw the run away")

    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
