"""LoRA: a frozen linear layer learns a low-rank update beside it.

    y = W x + b + s B A dropout(x)        s = alpha / rank, or alpha / sqrt(rank) with rslora

LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, LoRA+ https://arxiv.org/abs/2402.12354.
Trains rank * (in + out) parameters for each target. Folds: W <- W + s B A. In peft: LORA.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from litpeft.core.kinds import check_share
from litpeft.core.typed import LATER
from litpeft.model.delta import Method, linears, matching
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta, Linear, LowRankDelta, kaiming

LARGEST_RANK = 65536  # wider than any layer there is
LARGEST_ALPHA = 1e30  # far beyond it float32 overflows

Shape = tuple[int, int, int, float, float]


class LowRank(LowRankDelta):
    """s B A x, with A (rank, in) random and B (out, rank) zero at the start, so that nothing changes at first."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.tensor("A", (rank, in_features), kaiming)
        self.tensor("B", (out_features, rank), 0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.scale * self.B


def check_update(method: Any) -> None:
    """Raises a ValueError if `alpha` or `dropout` of a method with low-rank updates is out of bounds."""
    if method.alpha is not None and not 0 < method.alpha < LARGEST_ALPHA:
        raise ValueError(f"method.alpha must be above 0 and below {LARGEST_ALPHA:.0e}, got {method.alpha}")
    check_share(method, "method.", "dropout")


@dataclass
class LoRA(Method):
    """Low-rank updates beside frozen linear layers."""

    rank: int = 8
    """Rank of the update of one linear layer."""
    alpha: float | None = None
    """Scale of the update is alpha / rank; default 2 * rank."""
    dropout: float = 0.0
    """Share of the update's input that is dropped in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead, which keeps high ranks learning."""
    targets: tuple[str, ...] = ("*.attn.*", "*.mlp.*")
    """Globs of the linear layers that get an update."""
    ranks: dict[str, int] = field(default_factory=dict)
    """Other ranks for some targets, by glob, e.g. {"*.mlp.*": 16}; the last glob that matches counts."""
    lr_ratio: float = field(default=1.0, metadata=LATER)
    """B learns at lr_ratio * train.lr; the LoRA+ paper takes 16 with half of LoRA's train.lr."""

    def __post_init__(self) -> None:
        for key, rank in {"rank": self.rank, **{f'ranks["{glob}"]': rank for glob, rank in self.ranks.items()}}.items():
            if not 1 <= rank <= LARGEST_RANK:
                raise ValueError(f"method.{key} must be at least 1 and at most {LARGEST_RANK}, got {rank}")
        check_update(self)
        if not 1e-6 <= self.lr_ratio <= 1e6:
            raise ValueError(f"method.lr_ratio must be at least 1e-6 and at most 1e6, got {self.lr_ratio}")

    def attach(self, model: GPT) -> None:
        for linear, shape in self.shapes(model).values():
            self.fill(linear, "lora", LowRank(*shape))

    def fill(self, linear: Linear, name: str, delta: Delta) -> None:
        """Puts a Delta with an A and a B into the slot of a linear layer."""
        delta.lr_factors = {"B": self.lr_ratio}
        linear.slot.add(name, delta)

    def shapes(self, model: GPT) -> dict[str, tuple[Linear, Shape]]:
        """Returns the targets by name, each with its sizes in and out, rank, scale and dropout."""
        targets, shapes = linears(model, self.targets), {}
        ranks = dict.fromkeys(targets, self.rank)
        for glob, rank in self.ranks.items():
            ranks |= dict.fromkeys(matching(targets, glob, "target", "method.ranks"), rank)
        for name, rank in ranks.items():
            linear, alpha = targets[name], 2 * rank if self.alpha is None else self.alpha
            scale = alpha / rank**0.5 if self.rslora else alpha / rank
            shapes[name] = linear, (linear.in_features, linear.out_features, rank, scale, self.dropout)
        return shapes
