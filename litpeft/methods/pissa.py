"""PiSSA: LoRA whose update starts as the largest singular parts of the weight, which the frozen weight is left without.

    y = (W - s B0 A0) x + b + s B A dropout(x)        W = U S V^T,  B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r^T

    A = A0 and B = B0 at the start, so nothing changes at first but for rounding

PiSSA https://arxiv.org/abs/2404.02948. On a quantised base W - s B0 A0 is quantised, whose error is smaller than W's.
A0 and B0 are saved too: with them a run makes the frozen weight again from the base's files; `/base` adds them to it.
Trains rank * (in + out) parameters for each target. Folds: W <- W - s B0 A0 + s B A. In peft: LORA.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.methods.lora import LoRA, LowRank
from litpeft.model.delta import Held
from litpeft.model.gpt import GPT
from litpeft.model.kernels.low_rank import Factors
from litpeft.model.singular import largest
from litpeft.model.slots import Linear, LowRankDelta


class Taken(LowRankDelta):
    """s B0 A0 x: puts back what was taken out of the weight."""

    def __init__(self, delta: "Split"):
        super().__init__()
        self.delta = (delta,)  # a tuple hides the module

    def factors(self) -> tuple[Tensor, Tensor]:
        (delta,) = self.delta
        return delta.A0, delta.scale * delta.B0


class Split(LowRank):
    """s B A x beside W - s B0 A0."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float):
        super().__init__(in_features, out_features, rank, scale, dropout)
        self.buffer("A0", self.A.shape, 0.0, kept="result")
        self.buffer("B0", self.B.shape, 0.0, kept="result")

    def off(self) -> Taken:
        return Taken(self)

    def peft(self) -> dict[str, Tensor]:  # beside the whole weight: twice the rank
        return {"lora_A": torch.cat((self.A, self.A0)), "lora_B": torch.cat((self.B, -self.B0), 1)}


def rest(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns the weight less B A, in float32 or better."""
    a, b = a.to(weight.device), b.to(weight.device)
    return weight.to(torch.promote_types(weight.dtype, a.dtype)) - b @ a


@dataclass
class PiSSA(LoRA):
    """Low-rank updates that start as the largest singular parts of the weights."""

    name: ClassVar[str] = "pissa"
    vectors: ClassVar[int] = 1  # singular vectors of the weight for each rank

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            most = min(shape[:2]) // self.vectors  # a weight has no more singular parts than its smaller side
            self.fill(linear, self.name, Split(*shape[:2], min(shape[2], most), *shape[3:]))

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        delta = linear.slot.deltas.get(self.name)
        if delta is None:
            return weight
        if saved is not None:
            a, b = (saved.get(f"{name}.slot.{self.name}.{key}") for key in ("A0", "B0"))
            if a is None or b is None or (len(b), *a.shape[1:]) != weight.shape:
                return weight  # load_delta says what is wrong
            return rest(weight, a, delta.scale * b)
        weight = weight.to(torch.promote_types(weight.dtype, delta.A.dtype))
        (a0, b0), (a, b) = self.parts(name, weight, len(delta.A), held)
        for key, tensor in {"A0": a0, "B0": b0, "A": a, "B": b}.items():
            copy_shard(getattr(delta, key), tensor / delta.scale**0.5)
        return rest(weight, delta.A0, delta.scale * delta.B0)

    def parts(self, name: str, weight: Tensor, rank: int, held: Held) -> tuple[Factors, Factors]:
        """Returns the factors that are taken out of the weight, and those that the update starts with."""
        pair = largest(weight, rank)
        return pair, pair
