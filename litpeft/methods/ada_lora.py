"""AdaLoRA: low-rank updates in the form of singular values, of which the least important are set to zero in training.

    y = W x + b + s B diag(E) A dropout(x)        s = alpha / rank, of the rank at the start

    loss + orthogonality * mean(||A A^T - I||, ||B^T B - I||)        A (rank, in), E (rank,), B (out, rank)

    importance of the triple k:  that of E_k, and the means over A_k and B_k; of a number: see model/importance.py

E = 0 at the start, so nothing changes at first. Of the `rank` triples of a layer fewer and fewer are kept, in the end
`final_rank` on average; then the choice stands. A triple that was set to zero may grow again before that.

AdaLoRA https://arxiv.org/abs/2303.10512.
Trains rank * (in + out + 1) parameters for each target. Folds: W <- W + s B diag(E) A. In peft: LORA.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.core.distributed import copy_shard, gather
from litpeft.core.kinds import check_least
from litpeft.methods.lora import LoRA
from litpeft.model.delta import deltas_of
from litpeft.model.gpt import GPT
from litpeft.model.importance import Weighed


class Triples(Weighed):
    """s B diag(E) A x, of which each number has an importance."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        normal = partial(nn.init.normal_, std=0.02)
        self.weighed_tensor("A", (rank, in_features), normal)
        self.weighed_tensor("E", (rank,), 0.0)
        self.weighed_tensor("B", (out_features, rank), normal)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.E[:, None] * self.A, self.scale * self.B

    def importance(self) -> Tensor:
        """Returns the importance of each triple (rank,)."""
        a, e, b = (self.importance_of(name) for name in "AEB")
        return e + a.mean(1) + b.mean(0)

    def distance(self) -> Tensor:
        """Returns how far the rows of A and the columns of B are from being orthonormal."""
        a, b = gather(self.A), gather(self.B)
        one = torch.eye(len(a), dtype=a.dtype, device=a.device)
        return (a @ a.T - one).norm() + (b.T @ b - one).norm()


def budget_at(step: int, steps: int, first: int, last: int, begin: int, end: int) -> int:
    """Returns how many triples are kept after a step: `first` up to step `begin`, `last` for the last `end` steps."""
    if step <= begin:
        return first
    left = 1 - (step - begin) / (steps - end - begin) if step < steps - end else 0.0
    return int((first - last) * left**3 + last)


@dataclass
class AdaLoRA(LoRA):
    """Low-rank updates whose ranks move to the layers where they matter."""

    training_only: ClassVar[tuple[str, ...]] = (
        *LoRA.training_only,
        *("final_rank", "begin", "end", "interval", "orthogonality"),
    )

    rank: int = 12
    """Rank of the update of one linear layer at the start."""
    final_rank: int = 8
    """Rank at the end, on average over the layers."""
    begin: float = 0.1
    """Share of the steps before the first rank is taken away."""
    end: float = 0.3
    """Share of the steps after the last one is."""
    interval: int = 1
    """Steps from one choice of ranks to the next."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps the triples orthogonal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, "method.", final_rank=1, most=self.rank)
        check_least(self, "method.", interval=1, begin=0, end=0)
        if not self.begin + self.end < 1:
            raise ValueError(f"method.begin and method.end must be below 1 together, got {self.begin} and {self.end}")
        if not 0 <= self.orthogonality <= 1e6:
            raise ValueError(f"method.orthogonality must be at least 0 and at most 1e6, got {self.orthogonality}")

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            self.fill(linear, "ada_lora", Triples(*shape))

    def penalty(self, model: GPT) -> Tensor:
        found = deltas_of(model, Triples)
        return self.orthogonality / (2 * len(found)) * torch.stack([delta.distance() for delta in found]).sum()

    @torch.no_grad()
    def after_step(self, model: GPT, step: int, steps: int) -> None:
        found, begin, end = deltas_of(model, Triples), round(self.begin * steps), round(self.end * steps)
        settled = step >= steps - end  # from here on the importance stands still, and so the choice
        for delta in () if settled else found:
            delta.observe()
        importance = torch.cat([delta.importance() for delta in found])
        if step <= begin or (step % self.interval and not settled) or not importance.any():
            return
        budget = budget_at(step, steps, len(importance), self.final_rank * len(found), begin, end)
        kept = torch.zeros_like(importance)
        kept[importance.argsort(descending=True, stable=True)[:budget]] = 1
        for delta, keeps in zip(found, kept.split([len(delta.E) for delta in found]), strict=True):
            copy_shard(delta.E, gather(delta.E) * keeps)
