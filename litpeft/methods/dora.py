"""DoRA: the direction of each row of a weight learns a low-rank update, and its magnitude trains by itself.

    y = n * (W x + s B A x) + b        n = m / ||W + s B A||, the norm of each row, a constant of the step

    m (out,) = ||W|| and B = 0, so nothing changes at first

DoRA https://arxiv.org/abs/2402.09353; that no gradient goes through the norm is its section 4.3.
Trains rank * (in + out) + out parameters for each target. Folds: W <- n * (W + s B A). In peft: LORA.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.distributed import copy_shard
from litpeft.core.errors import ConfigError
from litpeft.methods.lora import LoRA
from litpeft.model.affine import Affine
from litpeft.model.context import Context
from litpeft.model.delta import Held
from litpeft.model.gpt import GPT
from litpeft.model.recompute import dropout
from litpeft.model.slots import Delta, Linear, kaiming


class Decomposed(Delta):
    """n * (W x + s B A x) + b, with A (rank, in), B (out, rank) and m (out,)."""

    claims = "the weight itself"

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.tensor("A", (rank, in_features), kaiming)
        self.tensor("B", (out_features, rank), 0.0)
        self.tensor("m", (out_features,), 1.0)  # until `start` knows W
        self.buffer("squares", (out_features,), 1.0, kept="nowhere")  # ||W||^2

    @torch.no_grad()
    def norm(self, linear: Linear) -> Tensor:
        """Returns ||W + s B A|| (out,) from ||W||^2 + 2 s W A^T . B + s^2 ||B A||^2: no matrix (out, in) is made."""
        weight, a, b = linear.dense(), self.A, self.scale * self.B
        wa = F.linear(weight, a.to(weight.dtype)).to(b.dtype)  # (out, rank)
        squares = self.squares + (b * (2 * wa + b @ (a @ a.T))).sum(1)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # a row of zeros has a magnitude of 0

    def affine(self, linear: Linear) -> Affine:
        n = self.m / self.norm(linear)
        shift = None if linear.bias is None else (1 - n) * linear.bias
        return Affine(n, self.A, n[:, None] * (self.scale * self.B), shift)

    def peft(self) -> dict[str, Tensor]:
        return {"lora_A": self.A, "lora_B": self.B, "lora_magnitude_vector": self.m}

    def forward(self, y: Tensor, x: Tensor, linear: Linear, ctx: Context | None) -> Tensor:
        if not (self.dropout and self.training):
            return super().forward(y, x, linear, ctx)
        x = dropout(x, self.dropout)
        z = linear.base(x)  # as in peft, the change of y is computed from the dropped x: y + (n - 1) W x + n s B A x
        return y - z + super().forward(z, x, linear, ctx)


@dataclass
class DoRA(LoRA):
    """Low-rank updates of the directions of a weight's rows, and a trained magnitude for each row."""

    def attach(self, model: GPT) -> None:
        for name, (linear, shape) in self.shapes(model).items():
            if any(fnmatchcase(f"{name}.weight", glob) for glob in self.unfreeze):
                what = f"{name}.weight would train, while its norm is a magnitude that dora trains"
                raise ConfigError(what, where="method.unfreeze", hint="leave it out here or in the targets")
            self.fill(linear, "dora", Decomposed(*shape))

    def start(self, name: str, linear: Linear, weight: Tensor, held: Held, saved: dict[str, Tensor] | None) -> Tensor:
        delta = linear.slot.deltas.get("dora")  # of a saved one m will be loaded, but ||W||^2 is not saved
        if delta is not None:
            norm = torch.linalg.vector_norm(held(weight), dim=1, dtype=delta.squares.dtype)
            delta.squares.copy_(norm.square())
            copy_shard(delta.m, delta.squares.sqrt())
        return weight
