"""LQ-LoRA: LoRA on a base whose weights are held in as many bits as a budget allows, codes and start chosen together.

    B A = the largest singular parts of W - Q,   Q = q(W - B A),   in turn, from Q = 0 on; the best pair is kept

    y = Q x + b + s B' A' dropout(x)        s B' A' = B A at the start

Before that each matrix gets one of several storages q: those with the smallest sum of squared errors |W - B A - Q|^2
whose bytes are within the budget. With `fisher_rows` errors are weighted by how much the loss of so many rows depends
on the weights: rows and columns of W - Q by the roots w1, w2 of their mean squared gradients (Fisher information).

LQ-LoRA https://arxiv.org/abs/2311.12023; its code keeps the last pair, which it stopped at because it was worse.
Trains rank * (in + out) parameters for each target. Folds: W <- Q + s B A.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.core.kinds import check_least
from litpeft.data.batches import Batch
from litpeft.methods.loftq import LoftQ
from litpeft.model.delta import Held, linears
from litpeft.model.fisher import error_weights, mean_squares
from litpeft.model.gpt import GPT
from litpeft.model.kernels.low_rank import Factors
from litpeft.model.quantize import STORAGES, Storage
from litpeft.model.quantize.allocation import least_costly
from litpeft.model.quantize.quantized import empty_layer
from litpeft.model.singular import largest_weighted
from litpeft.model.slots import Bank, Linear


@dataclass
class LQLoRA(LoftQ):
    """LoRA on a base that is held in mixed numbers of bits, within a budget."""

    name: ClassVar[str] = "lq_lora"

    training_only: ClassVar[tuple[str, ...]] = (*LoftQ.training_only, "fisher_rows")

    iterations: int = 10
    """Most times that update and codes are made in turn."""
    bits: float = 3.5
    """Bits for each weight of the targets on average, constants included."""
    storages: tuple[str, ...] = ("nf2", "nf3", "nf4")
    """What a matrix may be held in."""
    fisher_rows: int = 0
    """Rows to train on whose gradients weight the errors; 0: all weights count alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", fisher_rows=0)
        if not 1 <= self.bits <= 64:
            raise ValueError(f"method.bits must be at least 1 and at most 64, got {self.bits}")
        if wrong := [name for name in self.storages or ("none",) if name not in STORAGES]:
            raise ValueError(f"method.storages must be of {', '.join(STORAGES)}, got {wrong[0][:40]!r}")
        self.chosen: list[int] = []  # of `storages`, for each target
        self.weights: dict[str, tuple[Tensor, Tensor]] = {}  # of the rows (out, 1) and columns (1, in) of a target

    def attach(self, model: GPT) -> None:
        super().attach(model)
        targets = self.shapes(model)
        chosen = self.chosen or [0] * len(targets)
        bank = model.banks[self.name] = Bank()
        fill = lambda tensor: tensor.copy_(torch.tensor(chosen))  # noqa: E731
        bank.tensor("storages", (len(targets),), fill, trains=False)

    def choose(
        self, model: GPT, storage: Storage, read: Callable[[str], Tensor], saved: dict[str, Tensor] | None
    ) -> dict[str, str]:
        targets = self.shapes(model)
        if saved is None:
            self.chosen = self.allocation(model, targets, storage, read)
        else:
            numbers = saved.get(f"banks.{self.name}.storages", torch.empty(0)).int().tolist()
            if len(numbers) != len(targets) or not {*numbers} <= {*range(len(self.storages))}:
                raise ModelError(f"the delta does not say which of {', '.join(self.storages)} each target is held in")
            self.chosen = numbers
        return {name: self.storages[number] for name, number in zip(targets, self.chosen, strict=True)}

    def allocation(
        self, model: GPT, targets: dict[str, tuple[Linear, tuple]], storage: Storage, read: Callable[[str], Tensor]
    ) -> list[int]:
        """Returns which of `storages` holds each target at the least cost."""
        layers = [
            [empty_layer(linear, name, storage.double_quantize, model.dtype) for name in self.storages]
            for linear, _ in targets.values()
        ]
        sizes = [[sum(t.nbytes for t in layer.layout().values()) for layer in choices] for choices in layers]
        weights, least = sum(shape[0] * shape[1] for _, shape in targets.values()), sum(map(min, sizes))
        budget = int(self.bits * weights / 8)
        if budget < least:
            what = f"must be at least {8 * least / weights + 1e-4:.4f}, what the smallest of method.storages takes"
            raise ConfigError(f"{what}, got {self.bits}", where="method.bits")
        costs = []
        for (name, (_, shape)), choices in zip(targets.items(), layers, strict=True):
            weight = read(name).to(torch.promote_types(model.dtype, torch.float32))
            w1, w2 = self.weights_of(name, weight)
            a, b = largest_weighted(weight, min(shape[:3]), w1, w2)
            rest = weight - b @ a
            errors = (w1 * (rest - layer.unpacked(layer.pack(rest))) * w2 for layer in choices)
            costs.append([float(error.square().sum()) for error in errors])
        return least_costly(costs, sizes, budget)

    def weights_of(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        one = weight.new_ones(1, 1)
        return tuple(tensor.to(weight) for tensor in self.weights.get(name, (one, one)))

    def parts(self, name: str, weight: Tensor, rank: int, held: Held) -> tuple[Factors, Factors]:
        (w1, w2), codes, best, pair = self.weights_of(name, weight), 0, torch.inf, None
        for _ in range(self.iterations):
            a, b = largest_weighted(weight - codes, rank, w1, w2)
            codes = held(weight - b @ a)
            error = float((w1 * (weight - codes - b @ a) * w2).square().sum())
            if error >= best:
                break
            best, pair = error, (a, b)
        return pair, pair

    def defines(self, hook: str) -> bool:
        return super().defines(hook) and (hook != "calibrate" or self.fisher_rows > 0)

    def calibrate(self, model: GPT, batches: Iterator[Batch]) -> None:
        found = mean_squares(model, linears(model, self.targets), islice(batches, self.fisher_rows))
        self.weights = {name: error_weights(means) for name, means in found.items()}
