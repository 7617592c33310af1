"""MultiLoRA: several low-rank updates beside a linear layer, each scaled output by output.

    y = W x + b + s sum_j c_j * (B_j A_j dropout(x))        s = alpha / rank, j = 1 to n

    A_j (rank, in) and B_j (out, rank) random, c_j (out,) = 0 at the start, so nothing changes at first

MultiLoRA https://arxiv.org/abs/2311.11501. Since c_j is zero and not B_j, the updates do not all begin alike.
Trains n * (rank * (in + out) + out) parameters for each target. Folds: W <- W + s sum_j diag(c_j) B_j A_j.
In peft: LORA.
"""

from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from litpeft.core.kinds import check_least
from litpeft.methods.lora import LoRA, LowRank
from litpeft.model.gpt import GPT

LARGEST_NUMBER = 64


class LowRanks(LowRank):
    """The updates side by side: A (n rank, in), B (out, n rank), c (n, out)."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, number: int):
        super().__init__(in_features, out_features, number * rank, scale, dropout)
        self.rank = rank
        self.starts["B"] = lambda b: nn.init.uniform_(b, -(rank**-0.5), rank**-0.5)  # of each B_j, with `rank` inputs
        self.tensor("c", (number, out_features), 0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B * self.c.T.repeat_interleave(self.rank, 1)


@dataclass
class MultiLoRA(LoRA):
    """Several low-rank updates beside each frozen linear layer, each scaled output by output."""

    number: int = 3
    """Updates beside one linear layer, each of rank `rank`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", number=1, most=LARGEST_NUMBER)

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            self.fill(linear, "multi_lora", LowRanks(*shape, self.number))
