"""EVA: LoRA whose first matrix starts at the principal components of a layer's inputs.

    y = W x + b + s B A dropout(x)        A = the principal components of x, over the trained tokens of some rows

    B = 0 at the start, so nothing changes at first

The components of all targets are sorted by the share of the variance of their inputs that they explain. The first
rank * targets of them are taken, so that a target gets between 0 and rho * rank. Its own number is its rank in s.

EVA https://arxiv.org/abs/2410.07170.
Trains rank * (in + out) parameters for each target, of the rank that it gets. Folds: W <- W + s B A. In peft: LORA.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.kinds import check_least
from litpeft.data.batches import Batch
from litpeft.methods.lora import LoRA, LowRank, Shape
from litpeft.model.context import Context
from litpeft.model.delta import Held
from litpeft.model.gpt import GPT
from litpeft.model.objective import summed_loss
from litpeft.model.singular import Components
from litpeft.model.slots import Delta, Linear

TOKENS = 256  # of a row at most, evenly spread


class Watch(Delta):
    """Leaves y as it is, and keeps x."""

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context | None) -> Tensor:
        self.x = x
        return y


@dataclass
class EVA(LoRA):
    """Low-rank updates that start along the inputs' principal components."""

    training_only: ClassVar[tuple[str, ...]] = (*LoRA.training_only, "calibration_rows", "rho")

    calibration_rows: int = 32
    """Rows whose activations are measured before the training."""
    rho: float = 2.0
    """A target gets at most so many times its rank; 1 leaves all ranks as they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", calibration_rows=1)
        if not 1 <= self.rho <= 1000:
            raise ValueError(f"method.rho must be at least 1 and at most 1000, got {self.rho}")
        self.found: dict[str, Tensor] = {}  # components (rank, in), by target
        self.given: dict[str, int] | None = None  # ranks by target; None: as the settings say

    def shapes(self, model: GPT) -> dict[str, tuple[Linear, Shape]]:
        shapes = super().shapes(model)
        given = {name: shape[2] for name, (_, shape) in shapes.items()} if self.given is None else self.given
        ranked = {name: (layer, shape) for name, (layer, shape) in shapes.items() if given.get(name)}
        return {name: (layer, (*shape[:2], given[name], *shape[3:])) for name, (layer, shape) in ranked.items()}

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            self.fill(linear, "eva", LowRank(*shape))

    @torch.no_grad()
    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        shapes, found = self.shapes(model), {}
        for linear, _ in shapes.values():
            linear.slot.add("eva", Watch())
        for batch in islice(batches, self.calibration_rows):
            summed_loss(model, batch)
            seen: dict[int, str] = {}  # by id(x): the first layer that reads this x
            at = (batch.at + 1)[:: -(-len(batch.at) // TOKENS)]  # the trained tokens themselves
            for name, (linear, shape) in shapes.items():
                x = linear.slot.eva.x
                first = seen.setdefault(id(x), name)
                most = min(round(self.rho * max(shape[2] for _, shape in shapes.values())), *shape[:2])
                found[name] = found.get(first) or Components(shape[0], most)
                if first == name:
                    found[name].add(x[0, at] if x.ndim == 3 else x)  # the head reads some tokens only
        for linear, _ in shapes.values():
            linear.slot.deltas.pop("eva")
        self.given = dict.fromkeys(shapes, 0)
        shares = []
        for name, (_, shape) in shapes.items():
            shares += [(-float(share), name) for share in found[name].shares()[: round(self.rho * shape[2])]]
        for _, name in sorted(shares, key=lambda pair: pair[0])[: sum(shape[2] for _, shape in shapes.values())]:
            self.given[name] += 1
        self.found = {name: components.directions(self.given[name]) for name, components in found.items()}

    def restore(self, saved: dict[str, Tensor]) -> None:
        parts = {key.partition(".slot.eva."): tensor for key, tensor in saved.items()}
        self.given = {name: len(tensor) for (name, _, leaf), tensor in parts.items() if leaf == "A"}

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        if saved is None and self.given is not None and self.given.get(name):
            copy_shard(linear.slot.eva.A, self.found[name])
        return weight
