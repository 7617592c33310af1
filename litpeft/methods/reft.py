"""ReFT: edits the residual stream h (d,) after each block, in a subspace of r dimensions.

    h <- h + R^T (W h + b - R h)        loreft and noreft
    h <- h + R^T (W h + b)              direft

W (r, d) and b (r,) train, and so does R (r, d). In loreft the rows of R stay orthonormal; in the other two R is free.
Only the first `first` and the last `last` tokens of the prompt are edited, each at most half of the prompt.

ReFT https://arxiv.org/abs/2404.03592.
Trains 2 r d + r parameters for each block, twice as many untied. Does not fold: it depends on the position.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.core.kinds import check_choices, check_least, check_share
from litpeft.core.typed import LATER
from litpeft.methods.lora import LARGEST_RANK
from litpeft.model.context import Context
from litpeft.model.delta import Method
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta, kaiming


class Edit(Delta):
    """h + R^T (W h + b - R h) at the first and last tokens of each document's prompt.

    M (r, d) trains and is saved; R are its rows, orthonormalised one after the other (Gram-Schmidt) by a QR with fixed
    signs, as a flipped row of R would be another function. So R is orthonormal after every step of any optimizer, M has
    no constraint that a shard or a checkpoint could break, and R follows from M bit for bit.
    """

    at_prompt = True

    def __init__(self, width: int, rank: int, kind: str, first: int, last: int, init: str, dropout: float):
        super().__init__()
        self.kind, self.first, self.last, self.init, self.dropout = kind, first, last, init, dropout
        self.tensor("M", (rank, width), nn.init.orthogonal_)
        self.tensor("W", (rank, width), kaiming)
        self.tensor("b", (rank,), 0.0)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.init == "identity":
            self.W.data = torch.zeros_like(self.W) if self.kind == "direft" else self.rows().detach().clone()

    def rows(self) -> Tensor:
        """Returns R (r, d)."""
        if self.kind != "loreft":
            return self.M
        q, upper = torch.linalg.qr(self.M.mT)  # (d, r), (r, r)
        return (q * upper.diagonal().sign()).mT

    def edited(self, ctx: Context) -> Tensor:
        """Returns which tokens are edited, (B, T)."""
        pos, prompt = ctx.pos - ctx.virtual_tokens, ctx.prompt_lengths - ctx.virtual_tokens
        half = prompt // 2
        first, last = half.clamp(max=self.first), half.clamp(max=self.last)
        return ((pos >= 0) & (pos < first)) | ((pos >= prompt - last) & (pos < prompt))

    def forward(self, h: Tensor, ctx: Context) -> Tensor:
        if ctx.prompt_lengths is None:  # no prompt
            return h
        R = self.rows()
        W = self.W if self.kind == "direft" else self.W - R
        R, W, b = (tensor.to(h.dtype) for tensor in (R, W, self.b))
        change = F.dropout(F.linear(h, W, b) @ R, self.dropout, self.training)
        return torch.where(self.edited(ctx)[..., None], h + change, h)


@dataclass
class ReFT(Method):
    """Low-rank edits of the residual stream between blocks, at the ends of the prompt."""

    kind: Literal["loreft", "noreft", "direft"] = "loreft"
    """Which edit: in an orthonormal subspace, in any subspace, or without subtracting R h."""
    rank: int = 4
    """Dimensions of the subspace."""
    first: int = 5
    """Tokens at the prompt's start that are edited."""
    last: int = 5
    """Tokens at the prompt's end that are edited."""
    tied: bool = True
    """One edit for both ends of the prompt; false: one for each."""
    layers: tuple[int, ...] | None = None
    """Numbers of the blocks, from 0, after which is edited; default: all."""
    init: Literal["paper", "identity"] = field(default="paper", metadata=LATER)
    """How W and b start: at random as in the paper, or so that nothing changes at first."""
    dropout: float = field(default=0.0, metadata=LATER)
    """Share of an edit's change that is dropped in training."""

    def __post_init__(self) -> None:
        check_choices(self, "method.")
        check_least(self, "method.", rank=1, most=LARGEST_RANK)
        check_least(self, "method.", first=0, last=0)
        check_share(self, "method.", "dropout")
        if self.first + self.last == 0 or (not self.tied and not (self.first and self.last)):
            raise ValueError("method.first and method.last must not be 0: no token would be edited")

    def attach(self, model: GPT) -> None:
        blocks, width = model.blocks, model.config.d_model
        if self.rank > width:
            what = f"{self.rank} is more than {width}, the width of this model"
            raise ConfigError(what, where="method.rank")
        layers = range(len(blocks)) if self.layers is None else self.layers
        ends = [("reft", self.first, self.last)]
        if not self.tied:
            ends = [("reft", self.first, 0), ("reft_last", 0, self.last)]
        for layer in layers:
            if not 0 <= layer < len(blocks):
                what = f"there is no block {layer}; the model has 0 to {len(blocks) - 1}"
                raise ConfigError(what, where="method.layers")
            for name, first, last in ends:
                edit = Edit(width, self.rank, self.kind, first, last, self.init, self.dropout)
                blocks[layer].after_block.add(name, edit)
