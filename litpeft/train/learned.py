"""Recognises a run that learns nothing: its gradient stays at exactly 0, or its end is no better than its start."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from litpeft.core.distributed import is_sharded
from litpeft.core.errors import NumericError, UserError
from litpeft.train.progress import Progress

if TYPE_CHECKING:
    from litpeft.train.fabric import Fabric

STILL = 5  # steps in a row without a gradient that end a run
LEARNED = 1e-3  # nats per token; at a smaller loss there may be nothing left to learn
PART = 1 << 18  # numbers that are summed in float64 at once: a copy of a whole tensor may be gigabytes
WORSE = 2  # times the first loss or that of a uniform guess, whichever is larger: a run that ends above has diverged
TOO_LARGE = "the steps before were too large: begin again with a lower train.lr, and --overwrite for the same out"


def count_still(progress: Progress, loss: float, norm: float, vocabulary: int) -> None:
    """Counts the steps in a row whose gradient is exactly 0 though there is a loss; raises at STILL of them.

    One such step may be chance. A step that the scaler of 16-mixed skips has a norm that is not finite.
    """
    progress.still = progress.still + 1 if norm == 0 and loss > LEARNED else 0
    if progress.still >= STILL:
        raise no_gradient(progress, loss, vocabulary)


def no_gradient(progress: Progress, loss: float, vocabulary: int) -> UserError:
    """Returns the error of a run without a gradient after its last steps, at this loss."""
    last = progress.step - progress.still  # the last step that had one
    uniform = abs(loss - math.log(vocabulary)) < 0.01
    guess = f" (as if each of the {vocabulary:,} tokens were as likely)" if uniform else ""
    since = f"after step {last}" if last else "from step 1 on"
    what = f"the gradient is exactly 0 {since} at a loss of {loss:.3f}{guess}: nothing is learned"
    hint = TOO_LARGE
    if not last:
        hint = "the base's activations overflow, or its weights are 0: take its files again, or another base.precision"
    return NumericError(what, hint=hint)


def sums(parameters: Iterable[Tensor]) -> list[tuple[float, float]]:
    """Returns the sum of each tensor and of its squares, or of this rank's share: any change of it changes them."""
    own = [p.detach().to_local() if is_sharded(p) else p.detach() for p in parameters]
    parts = ((part.double() for part in p.flatten().split(PART)) for p in own)
    pairs = [torch.stack([torch.stack([part.sum(), part.dot(part)]) for part in each]).sum(0) for each in parts]
    return [tuple(pair.tolist()) for pair in pairs]


def check_learned(progress: Progress, loss: float, norm: float, vocabulary: int) -> None:
    """Raises at the end of a run that learned nothing, or that ends worse than no model.

    `loss` and `norm` are the loss and the gradient's norm on the first step's rows, with the weights of the end.
    A norm of 0 alone is no error: these rows may not use what trains. It is one if the last step's norm was 0 too, or
    if the loss has changed since the first step.
    """
    first = progress.losses[0]
    if norm == 0 and loss > LEARNED and (progress.still or abs(loss - first) > 1e-5 * first):
        raise no_gradient(progress, loss, vocabulary)
    check_loss(progress, loss, vocabulary)


def check_loss(progress: Progress, loss: float, vocabulary: int) -> None:
    """Raises if the loss that a run ends with is far above that of its first step, and of a guess."""
    first = progress.losses[0]
    if loss > WORSE * max(first, math.log(vocabulary)):
        what = f"the loss was {first:.3f} in the first step and is {loss:,.3f} after step {progress.step}"
        guess = "that of the start" if progress.preferred else f"a guess among all {vocabulary:,} tokens"
        raise NumericError(f"{what}: {guess} is better", hint=TOO_LARGE)


def check_moved(
    progress: Progress, start: list[tuple[float, float]], parameters: Iterable[Tensor], fabric: "Fabric"
) -> None:
    """Raises if nothing that trains has changed; `start` are its sums before the first step."""
    moved = torch.tensor(float(sums(parameters) != start), device=fabric.device)
    if not fabric.all_reduce(moved, reduce_op="sum"):
        what = f"all that trains is after {progress.step} steps what it was before the first: nothing was learned"
        hint = "raise train.lr, or hold what trains in float32 (base.precision 32-true, method.master_weights true)"
        if getattr(fabric.strategy.precision, "scaler", None) is not None:
            hint = "each gradient overflowed in float16: take more steps, while its scale falls, or bf16-mixed"
        raise NumericError(what, hint=hint)
