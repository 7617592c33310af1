"""VeRA: all layers share one frozen random pair of matrices, and each learns two vectors that scale it.

    y = W x + b + diag(b') B diag(d) A dropout(x)        A (rank, in) and B (out, rank) follow from a seed

    d (rank,) = d_initial and b' (out,) = 0 at the start, so nothing changes at first

VeRA https://arxiv.org/abs/2310.11454. A and B have the largest in and out of all targets; a layer takes their first
columns and rows. A run saves the seed, not the matrices.
Trains rank + out parameters for each target. Folds: W <- W + diag(b') B diag(d) A. In peft: VERA.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from litpeft.core.kinds import check_least, check_share
from litpeft.methods.lora import LARGEST_RANK
from litpeft.model.delta import Method, linears
from litpeft.model.gpt import GPT
from litpeft.model.slots import Bank, LowRankDelta


class Projections(Bank):
    """A (rank, in) and B (out, rank), uniform with the deviation of Kaiming initialisation."""

    def __init__(self, in_features: int, out_features: int, rank: int, seed: int):
        super().__init__()
        self.seed = seed
        self.register_buffer("A", torch.empty(rank, in_features, dtype=torch.float32), persistent=False)
        self.register_buffer("B", torch.empty(out_features, rank, dtype=torch.float32), persistent=False)

    def reset_parameters(self) -> None:
        bits = np.random.PCG64(self.seed)  # numpy promises the same bits in every version; torch promises none
        for matrix in (self.A, self.B):
            unit = (bits.random_raw(matrix.numel()) >> 40).astype(np.float32) / 2**24  # in [0, 1)
            matrix.copy_(torch.from_numpy(2 * unit - 1).view_as(matrix) * (6 / matrix.size(1)) ** 0.5)


class Scaled(LowRankDelta):
    """diag(b) B diag(d) A x, with d (rank,) and b (out,) of its own."""

    def __init__(self, bank: Projections, in_features: int, out_features: int, d_initial: float, dropout: float):
        super().__init__()
        self.bank, self.sizes = (bank,), (in_features, out_features)  # a tuple hides the module
        self.dropout = dropout
        self.tensor("d", (len(bank.A),), d_initial)
        self.tensor("b", (out_features,), 0.0)

    def factors(self) -> tuple[Tensor, Tensor]:
        (bank,), (inputs, outputs) = self.bank, self.sizes
        return self.d[:, None] * bank.A[:, :inputs], self.b[:, None] * bank.B[:outputs]

    def peft(self) -> dict[str, Tensor]:
        (bank,) = self.bank
        return {"vera_lambda_d": self.d, "vera_lambda_b": self.b, "vera_A": bank.A, "vera_B": bank.B}


@dataclass
class VeRA(Method):
    """Two vectors for each layer that scale random matrices, which all layers share."""

    rank: int = 256
    """Rank of the update of one linear layer."""
    d_initial: float = 0.1
    """Start of the vector inside the update; the other one starts at zero."""
    dropout: float = 0.0
    """Share of the update's input that is dropped in training."""
    targets: tuple[str, ...] = ("*.attn.*", "*.mlp.*")
    """Globs of the linear layers that get an update."""
    seed: int = 0
    """What the random matrices follow from."""

    def __post_init__(self) -> None:
        check_least(self, "method.", rank=1, most=LARGEST_RANK)
        check_least(self, "method.", seed=0)
        if not 0 < abs(self.d_initial) < 1e6:
            raise ValueError(f"method.d_initial must not be 0 and be smaller than 1e6, got {self.d_initial}")
        check_share(self, "method.", "dropout")

    def attach(self, model: GPT) -> None:
        layers = linears(model, self.targets).values()
        sizes = (max(layer.in_features for layer in layers), max(layer.out_features for layer in layers))
        bank = model.banks["vera"] = Projections(*sizes, self.rank, self.seed)
        for layer in layers:
            delta = Scaled(bank, layer.in_features, layer.out_features, self.d_initial, self.dropout)
            layer.slot.add("vera", delta)
