"""The one training loop. It knows rows, losses and steps, and nothing of any method."""

import math
import random
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed

from litpeft.core.errors import NumericError
from litpeft.data.batches import Batch, lay_out, plan_epoch
from litpeft.data.rows import Row
from litpeft.generate.load import Loaded
from litpeft.model.delta import trainable
from litpeft.model.objective import MICRO_TOKENS
from litpeft.train.budget import fitting_warmup, tenth
from litpeft.train.checkpoints import Checkpoint
from litpeft.train.ending import Ending
from litpeft.train.learned import check_learned, check_loss, check_moved, count_still, sums
from litpeft.train.log import Log, duration
from litpeft.train.objective import Measured, Objective
from litpeft.train.optim import lr_at
from litpeft.train.planned_steps import planned_steps
from litpeft.train.preparation import Preparation
from litpeft.train.progress import Progress
from litpeft.train.recorded_pass import RecordedPasses
from litpeft.train.samples import exact_share, show_sample
from litpeft.train.saving import restore, save_checkpoint
from litpeft.train.signals import NAMES, StopSignals, exit_code
from litpeft.train.step import Stepper

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

DONE = "all steps done"
SHORT = 20  # steps up to which one gradient more at the end shows what a longer run shows by itself


@dataclass
class Trainer:
    """A run with its model and optimiser, and where they have got to."""

    fabric: "Fabric"
    model: torch.nn.Module  # as Fabric wraps it
    optimizer: torch.optim.Optimizer
    run: Preparation
    loaded: Loaded  # the model without Fabric's wrapper, as it answers
    log: Log
    signals: StopSignals
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.gpt, self.settings, self.steps = self.loaded.model, self.run.settings, self.run.steps
        self.rows = self.run.rows.train
        train, checkpoint, self.budget = self.settings.train, self.settings.checkpoint, self.run.budget
        self.save_every = tenth(self.steps) if checkpoint.interval is None else checkpoint.interval
        self.rates = replace(train, warmup_steps=fitting_warmup(train.warmup_steps, self.steps))
        self.held_out = self.run.rows.validation[: self.budget.rows]
        names = {id(parameter): name for name, parameter in trainable(self.gpt).items()}
        method = self.run.method
        self.search_step = method.search_step(self.steps)
        self.objective = Objective.of(self.run)
        recorded = RecordedPasses.of_run(self.gpt, self.fabric, method, self.settings.preference.loss is not None)
        steps, loss = self.steps, self.objective.loss
        self.stepper = Stepper(self.fabric, self.model, self.optimizer, train.max_norm, recorded, method, steps, loss)
        self.saved: int | None = None  # step of the newest checkpoint
        self.before = sums(trainable(self.gpt).values())
        self.ending = Ending(self.run, self.model, self.gpt, self.fabric)
        self.names = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def fit(self) -> Progress:
        """Trains to the end of the run, or to where it is stopped."""
        progress = self.progress
        self.start = time.perf_counter() - progress.elapsed
        limit = self.settings.train.max_time
        self.deadline = math.inf if limit is None else time.perf_counter() + 60 * limit
        self.model.train()
        owed = self.due() and progress.step not in dict(progress.validations)  # a signal ended the run before that
        if progress.step == 0:
            self.begin()
            with self.timed("ending"):
                self.ending.before(progress)
            self.measure()
        elif owed and self.judge(self.measure()):
            self.save()
        self.check_patience()  # a run that stopped for it may have been killed before it wrote its result
        self.signals.training = True
        if not progress.stopped:
            with closing(planned_steps(self.run, progress, self.fabric, self.keep)) as planned:
                self.take_steps(planned)
        if progress.exit_code:
            return progress
        if self.held_out and self.budget.sample_tokens and progress.sampled != progress.validations[-1][0]:
            with self.timed("measuring"):
                self.show_sample()  # the report's are of the end
        progress.stopped = progress.stopped or DONE
        return progress

    def begin(self) -> None:
        """Measures before the first step what the losses refer to."""
        with self.timed("measuring"):
            self.objective.begin(self.model, len(self.held_out), self.fabric)
            self.read_again()
        if self.objective.told:
            self.log.message(f"  {self.objective.told}: {duration(self.progress.measuring)}")

    def read_again(self, held_out: int | None = None) -> None:
        """Takes the rows with what the objective gave them, of the held-out ones at most so many."""
        self.rows = self.run.rows.train
        self.held_out = self.run.rows.validation[: len(self.held_out)][:held_out]

    def take_steps(self, planned: Iterator[list[Row]]) -> None:
        """Trains on the rows of each step, until there are no more or the run is to stop; measures and saves."""
        progress = self.progress
        for rows in planned:
            if progress.step == self.search_step:
                self.search()
            self.take_step(rows)
            if progress.exit_code:
                self.save()
                return
            better = self.due() and self.judge(self.measure())
            if progress.out_of_time and not self.due():
                self.measure()
            if better or progress.out_of_time or (self.save_every and progress.step % self.save_every == 0):
                self.save()
            if progress.stopped:
                return

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Counts the seconds of the block in, as a part of the run's time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            setattr(self.progress, part, getattr(self.progress, part) + time.perf_counter() - began)

    def check_result(self) -> None:
        """Raises if the weights that the run ends with learned nothing, or are worse than no model: see learned.py."""
        progress, settings, vocabulary = self.progress, self.settings, self.gpt.config.vocab_size
        check_moved(progress, self.before, trainable(self.gpt).values(), self.fabric)
        held_out = [loss for _, loss in progress.validations]
        # the model was better than a guess, and its loss fell: it has learned, and no gradient has to be computed
        fell = len(held_out) > 1 and held_out[-1] < held_out[0] < math.log(vocabulary)
        if progress.step > SHORT or fell:
            check_loss(progress, progress.losses[-1], vocabulary)
            return
        numbers = plan_epoch(len(self.rows), settings.train.batch_size, 0, settings.data.seed)[0]
        rows = [self.rows[i] for i in numbers]
        found = self.stepper.gradient(self.micro_batches(0, rows), self.objective.totals(rows)[1], progress.step + 1)
        self.optimizer.zero_grad()
        check_learned(progress, found.loss, found.norm, vocabulary)

    def clock(self) -> float:
        """Returns the seconds since the run began, without the time between a stop and its resume."""
        return time.perf_counter() - self.start

    def due(self) -> bool:
        """Returns whether the held-out rows are measured after this step."""
        return self.budget.due(self.progress.step)

    def take_step(self, rows: list[Row]) -> None:
        """Takes one optimizer step with these rows, and counts it in."""
        train, progress = self.settings.train, self.progress
        began = time.perf_counter()
        batches, (trained, weight) = self.micro_batches(progress.step, rows), self.objective.totals(rows)
        lr = lr_at(progress.step, self.steps, self.rates)
        with self.run.method.training_step(self.gpt, random.Random(f"{train.seed} {progress.step}")):
            found = self.stepper.step(batches, weight, lr, progress.step + 1, self.stop_votes)
        now = time.perf_counter()
        tokens = sum(row.tokens for row in rows)
        progress.step += 1
        progress.tokens += tokens
        progress.trained_tokens += trained
        progress.losses.append(found.loss)
        progress.seconds += now - began
        progress.elapsed = self.clock()
        self.apply_stop(found.votes)
        so_far = {key: getattr(progress, key) for key in ("step", "epoch", "tokens", "trained_tokens")}
        figures = {"loss": found.loss, "lr": lr, "grad_norm": found.norm, "tokens_per_second": tokens / (now - began)}
        self.log.step(**so_far, **figures, seconds=progress.elapsed)
        count_still(progress, found.loss, found.norm, self.gpt.config.vocab_size)

    def micro_batches(self, step: int, rows: list[Row]) -> list[Batch]:
        """Returns this rank's share of these rows; seeds the step's dropout.

        What is random in a step follows from its number, so that a resumed run draws the same.
        """
        fabric, train, frame = self.fabric, self.settings.train, self.gpt.frame
        torch.manual_seed(random.Random(f"{train.seed} {step} {fabric.global_rank}").getrandbits(62))
        size = None if self.settings.data.packing else train.micro_batch_size
        lengths = [len(row.documents) * sum(frame) + row.tokens for row in rows]
        layout = lay_out(range(len(rows)), lengths, fabric.world_size, train.micro_tokens, size)[fabric.global_rank]
        batches = (self.objective.batch([rows[i] for i in micro], rows[0], frame) for micro in layout)
        return [batch.to(fabric.device) for batch in batches]

    def stop_votes(self) -> list[float]:
        """Returns 1 for each reason that this rank has to stop: the signals, then max_time."""
        return [*(float(self.signals.asked == name) for name in NAMES), float(time.perf_counter() >= self.deadline)]

    def apply_stop(self, votes: list[float]) -> None:
        """Notes why the run stops, if any rank asks for it: all ranks know, and stop after the same step."""
        reason = next((name for name, vote in zip([*NAMES, ""], votes, strict=True) if vote), None)
        if reason is not None:
            self.progress.stopped = f"{reason or 'max_time reached'} at step {self.progress.step} of {self.steps}"
            self.progress.exit_code = exit_code(reason) if reason else 0
            self.progress.out_of_time = not reason

    def search(self) -> None:
        """Has the method choose among what it has learned, if it does; also in a run that is resumed at that step."""
        method = self.run.method
        if method.searches and (said := method.search(self.gpt, lambda: self.on_held_out().loss)):
            self.log.message(said)

    def on_held_out(self) -> Measured:
        """Returns what the model makes of the held-out rows."""
        tokens = self.settings.train.micro_tokens
        tokens = MICRO_TOKENS if tokens == "auto" else tokens  # it is left open where rows are not packed
        return self.objective.measure(self.model, self.held_out, tokens, self.fabric)

    def measure(self) -> float | None:
        """Returns the metric on the held-out rows, and shows an answer; None where there are no such rows."""
        if not self.held_out:
            return None
        with self.timed("measuring"):
            found = self.measured()
        self.progress.elapsed = self.clock()
        return found

    def measured(self) -> float:
        progress, found = self.progress, self.on_held_out()
        loss = found.loss
        if not math.isfinite(loss):
            what = f"the validation loss is {loss} after step {progress.step}: nothing more is trained or saved"
            raise NumericError(what, hint="lower train.lr, or choose another base.precision")
        progress.validations.append((progress.step, loss))
        if pairs := found.pairs:
            progress.preferred.append((progress.step, pairs.preferred, pairs.margin))
        metric = self.settings.validation.metric
        exact = exact_share(self.fabric, self.loaded, self.run.questions) if metric == "exact" else None
        self.log.validation(progress.step, loss, int(self.held_out.column("trained").sum()), exact, pairs)
        if self.budget.shows(progress.step):
            self.show_sample()
        return {"loss": loss, "exact": exact, "preferred": pairs and pairs.preferred}[metric]

    def show_sample(self) -> None:
        """Answers the first held-out rows."""
        show_sample(self.fabric, self.loaded, self.run.questions, self.budget.sample_tokens, self.log, self.progress)
        self.progress.sampled = self.progress.step

    def judge(self, value: float | None) -> bool:
        """Returns whether a measurement is the best so far and to be kept; notes it if patience is at its end."""
        progress, validation = self.progress, self.settings.validation
        if value is None:
            return False
        sign = 1 if validation.metric == "loss" else -1  # smaller is better, or larger
        if progress.best is None or sign * value < sign * progress.best[1]:
            progress.best, progress.waited = (progress.step, value), 0
            return self.settings.checkpoint.keep_best
        progress.waited += 1
        self.check_patience()
        return False

    def check_patience(self) -> None:
        """Stops the run if as many measurements in a row were no better as it has patience for."""
        progress, validation = self.progress, self.settings.validation
        if validation.patience is not None and progress.waited >= validation.patience:
            step, best = progress.best
            better = {
                "loss": f"better loss than {best:.4f}",
                "exact": f"more exact answers than {best:.1%}",
                "preferred": f"more preferred answers than {best:.1%}",
            }[validation.metric]
            counted = f"in {progress.waited} measurements, at step {progress.step} of {self.steps}"
            progress.stopped = f"no {better} of step {step} {counted}"

    def save(self) -> None:
        """Writes a checkpoint: all ranks give their shares, the first writes."""
        with self.timed("saving"):
            parts = self.fabric, self.gpt, self.optimizer, self.names, self.progress
            save_checkpoint(self.run, *parts, self.objective.tensors())
        self.saved = self.progress.step

    def keep(self) -> None:
        """Writes a checkpoint unless that of this step is written."""
        if self.saved != self.progress.step:
            self.save()

    def resume(self, saved: Checkpoint) -> None:
        """Puts model, optimiser and progress back to where a checkpoint has them."""
        self.progress = restore(self.fabric, self.gpt, self.optimizer, self.names, saved)
        self.saved = saved.step
        self.read_again(self.objective.resume(saved))
        if self.settings.validation.final == "best" and self.progress.best:
            self.run.checkpoints.at(self.progress.best[0])  # what is wrong with it is better known now than at the end
