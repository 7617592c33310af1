"""One optimizer step: the gradient of rows that are spread over micro-batches and ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch import Tensor

from litpeft.core.distributed import gather
from litpeft.core.errors import NumericError, some
from litpeft.data.batches import Batch
from litpeft.model.delta import Method, trainable
from litpeft.model.objective import summed_loss
from litpeft.train.recorded_pass import RecordedPasses

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

Votes = Callable[[], list[float]]
SummedLoss = Callable[[torch.nn.Module, Batch], Tensor]  # the sum of a micro-batch's losses, each times its weight


@dataclass
class Gradient:
    """What is known of a step's gradient, the same on every rank."""

    loss: float  # nats per trained token, by their weights
    norm: float  # before clipping
    votes: list[float]  # what each rank was asked, summed over the ranks


@dataclass
class Stepper:
    """Takes optimizer steps with this rank's micro-batches."""

    fabric: "Fabric"
    model: torch.nn.Module  # as Fabric wraps it
    optimizer: torch.optim.Optimizer
    max_norm: float | None = None  # to which gradients are clipped
    recorded: RecordedPasses | None = None  # of short passes on a GPU
    method: Method | None = None  # whose hooks are called
    steps: int = 0  # of the run
    loss: SummedLoss | None = None  # None: of rows, -log p of their trained tokens

    def step(self, batches: list[Batch], weight: float, lr: float, number: int, votes: Votes = list) -> Gradient:
        """Takes optimizer step `number`; returns what `gradient` does."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        found = self.gradient(batches, weight, number, votes)
        self.optimizer.step()
        if self.method is not None and math.isfinite(found.norm):  # else the scaler of 16-mixed has skipped the step
            self.method.after_step(self.model.module, number, self.steps)
        self.optimizer.zero_grad()
        return found

    def gradient(self, batches: list[Batch], weight: float, number: int, votes: Votes = list) -> Gradient:
        """Leaves the gradient of the micro-batches in what trains.

        The loss is a weighted mean over the trained tokens, or the pairs, of all micro-batches of all ranks. `weight`
        is the sum of their weights; one without a weight counts as 1. So it does not matter how the rows of a step are
        spread. What the method adds to the loss has a gradient, but is not in the loss that is returned.
        """
        from litpeft.train.fabric import DDPStrategy

        fabric, losses = self.fabric, []
        for micro, batch in enumerate(batches, 1):
            loss = None if self.recorded is None else self.recorded(batch, 1 / weight)
            if loss is not None:
                losses.append(loss)
                continue
            # FSDP would hold whole gradients while it does not exchange them: there each micro-batch does
            wait = micro < len(batches) and isinstance(fabric.strategy, DDPStrategy)
            with fabric.no_backward_sync(self.model, enabled=wait):
                loss = (self.loss or summed_loss)(self.model, batch)
                scaled = loss * (fabric.world_size / weight)  # Fabric averages the gradients of the ranks
                last = micro == len(batches) and self.method is not None
                penalty = self.method.penalty(self.model.module) if last else None
                fabric.backward(scaled if penalty is None else scaled + penalty.to(scaled.device))
            losses.append(loss.detach())
        limit = self.max_norm or math.inf
        norm = gather(fabric.clip_gradients(self.model, self.optimizer, max_norm=limit, error_if_nonfinite=False))
        total, norm = torch.stack([torch.stack(losses).double().sum(), norm.to(losses[0].device).double()]).tolist()
        sums = torch.tensor([total, norm, *votes()], dtype=torch.float64, device=fabric.device)
        sums = fabric.all_reduce(sums, reduce_op="sum").tolist()
        if not (math.isfinite(sums[0]) and math.isfinite(sums[1])):  # of the sums, so that all ranks decide the same
            self.refuse_nonfinite(batches, losses, number)
        return Gradient(sums[0] / weight, norm, sums[2:])

    def refuse_nonfinite(self, batches: list[Batch], losses: list[Tensor], step: int) -> None:
        """Raises on all ranks, naming what is not finite: what trains, the loss of some rows, or the first gradient.

        A gradient that overflows in float16 is no error: the scaler of 16-mixed skips that step and lowers its scale.
        """
        fabric, pairs = self.fabric, zip(batches, losses, strict=True)
        judged = [(batch.sources, bool(loss.isfinite())) for batch, loss in pairs if len(batch.targets)]
        if fabric.world_size > 1:
            everyones: list[list[tuple[tuple[str, ...], bool]]] = [[] for _ in range(fabric.world_size)]
            torch.distributed.all_gather_object(everyones, judged)
            judged = [one for rank in everyones for one in rank]
        rows = [source for sources, finite in judged if not finite for source in sources]
        if not rows and getattr(fabric.strategy.precision, "scaler", None) is not None:
            return
        named = trainable(self.model.module).items()  # Fabric's wrapper would put its own name before each
        spoilt = [name for name, p in named if not gather(p.detach()).isfinite().all()]
        bad = [name for name, p in named if p.grad is not None and not gather(p.grad).isfinite().all()]
        hint = "nothing of this step was taken; lower train.lr, or choose another base.precision"
        if spoilt:
            what = f"{spoilt[0]}, as step {step - 1} left it,"
        elif len(rows) > 1 and not any(finite for _, finite in judged):
            what = f"the loss of all {len(rows)} rows of the step ({some(rows)})"
            hint = f"the weights are at fault rather than a row; {hint}"
        elif rows:
            what = f"the loss of row{'s' * (len(rows) > 1)} {some(rows)}"
        else:
            what = f"the gradient of {bad[0]}" if bad else "the norm of the gradient"
        raise NumericError(f"step {step}: {what} is not finite", hint=hint)
