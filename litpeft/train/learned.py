"""Tells a run that learns nothing: its gradient stays at exactly 0, or what trains is at its end what it was before."""

import math
from collections.abc import Iterable

import torch
from lightning.fabric import Fabric
from torch import Tensor

from litpeft.distributed import is_share
from litpeft.errors import UserError
from litpeft.train.progress import Progress

STILL = 5  # steps in a row without a gradient that end a run
LEARNED = 1e-3  # nats per token; at a smaller loss there may be nothing left to learn
PART = 1 << 18  # numbers that are summed in float64 at once: a copy of a whole tensor may be gigabytes


def count_still(progress: Progress, loss: float, norm: float, vocabulary: int) -> None:
    """Counts the steps in a row whose gradient is exactly 0 though there is a loss; raises at STILL of them.

    One such step may be chance. A step that the scaler of 16-mixed skips has a norm that is not finite.
    """
    progress.still = progress.still + 1 if norm == 0 and loss > LEARNED else 0
    if progress.still >= STILL:
        raise no_gradient(progress, vocabulary)


def no_gradient(progress: Progress, vocabulary: int) -> UserError:
    """Returns the error of a run whose last steps had no gradient."""
    loss, first = progress.losses[-1], progress.step - progress.still + 1
    guess = (
        f" (as if each of the {vocabulary:,} tokens were as likely)" if abs(loss - math.log(vocabulary)) < 0.01 else ""
    )
    what = f"the gradient is exactly 0 since step {first} at a loss of {loss:.3f}{guess}: nothing is learned"
    hint = "the steps before were too large: begin again with a lower train.lr, and --overwrite for the same out"
    if first == 1:
        hint = "the base's activations overflow, or its weights are 0: take its files again, or another base.precision"
    return UserError("NUMERIC-003", what, hint=hint)


def sums(parameters: Iterable[Tensor]) -> list[tuple[float, float]]:
    """Returns the sum of each tensor and of its squares, or of this rank's share: any change of it changes them."""
    own = [p.detach().to_local() if is_share(p) else p.detach() for p in parameters]
    parts = ((part.double() for part in p.flatten().split(PART)) for p in own)
    pairs = [torch.stack([torch.stack([part.sum(), part.dot(part)]) for part in each]).sum(0) for each in parts]
    return [tuple(pair.tolist()) for pair in pairs]


def check_learned(
    progress: Progress, start: list[tuple[float, float]], parameters: Iterable[Tensor], fabric: Fabric, vocabulary: int
) -> None:
    """Raises at the end of a run that learned nothing; `start` are the sums of what trains before the first step."""
    if progress.step and progress.still >= min(2, progress.step):
        raise no_gradient(progress, vocabulary)
    moved = torch.tensor(float(sums(parameters) != start), device=fabric.device)
    if not fabric.all_reduce(moved, reduce_op="sum"):
        what = f"all that trains is after {progress.step} steps what it was before the first: nothing was learned"
        hint = "raise train.lr, or hold what trains in float32 (base.precision 32-true, method.master_weights true)"
        if getattr(fabric.strategy.precision, "scaler", None) is not None:
            hint = "each gradient overflowed in float16: take more steps, while its scale falls, or bf16-mixed"
        raise UserError("NUMERIC-004", what, hint=hint)
