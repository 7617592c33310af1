"""LoRA-GA: LoRA that starts along the gradients of the weights, so that it begins as full finetuning would.

    G = U S V^T, the gradient of the loss of some rows, summed        c = out^(1/4) / sqrt(gamma)

    y = (W - s B0 A0) x + b + s B A dropout(x)        A0 = c V_1..r^T,  B0 = c U_r+1..2r

    A = A0 and B = B0 at the start, so nothing changes at first but for rounding

LoRA-GA https://arxiv.org/abs/2407.05000. A0 and B0 are saved too, as with PiSSA.
Trains rank * (in + out) parameters for each target. Folds: W <- W - s B0 A0 + s B A. In peft: LORA.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ClassVar

from torch import Tensor

from litpeft.core.kinds import check_least
from litpeft.data.batches import Batch
from litpeft.methods.pissa import PiSSA
from litpeft.model.delta import Held
from litpeft.model.gpt import GPT
from litpeft.model.kernels.low_rank import Factors
from litpeft.model.objective import summed_loss
from litpeft.model.singular import singular_parts
from litpeft.model.slots import Linear


@dataclass
class LoRAGA(PiSSA):
    """Low-rank updates that start along the gradients of the weights."""

    name: ClassVar[str] = "lora_ga"
    vectors: ClassVar[int] = 2

    training_only: ClassVar[tuple[str, ...]] = (*PiSSA.training_only, "calibration_rows", "gamma")

    calibration_rows: int = 32
    """Rows whose gradients are summed before the training."""
    gamma: float = 16.0
    """The start of A and B is scaled by 1 / sqrt(gamma): the larger, the less of the weight moves into them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", calibration_rows=1)
        if not 1e-6 <= self.gamma <= 1e6:
            raise ValueError(f"method.gamma must be at least 1e-6 and at most 1e6, got {self.gamma}")
        self.found: dict[str, Factors] = {}  # A0 and B0 times sqrt(s), by target

    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        shapes, sums = self.shapes(model), {}

        def take(name: str, weight: Tensor) -> None:
            sums[name] = weight.grad.float() + sums.get(name, 0)
            weight.grad = None

        for name, (linear, _) in shapes.items():
            linear.weight.requires_grad_(True).register_post_accumulate_grad_hook(partial(take, name))
        for batch in islice(batches, self.calibration_rows):
            summed_loss(model, batch).backward()
        for name, gradient in sums.items():
            _, (_, out, rank, scale, _) = shapes[name]
            rank = min(rank, min(gradient.shape) // self.vectors)
            u, _, v = singular_parts(gradient, min(*gradient.shape, 4 * rank))
            c = scale**0.5 * out**0.25 / self.gamma**0.5
            self.found[name] = c * v[:, :rank].T, c * u[:, rank : 2 * rank]

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        known = saved is not None or name in self.found  # without gradients it is LoRA
        return super().start(name, linear, weight, held, saved) if known else weight

    def parts(self, name: str, weight: Tensor, rank: int, held: Held) -> tuple[Factors, Factors]:
        return self.found[name], self.found[name]
