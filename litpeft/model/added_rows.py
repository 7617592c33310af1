"""Tokens that a run adds to the vocabulary of its base: their rows of the embedding and of the head are learned.

    E <- E + P R        H <- H + P R'        P (V, n) = 1 where a row is the new token's, else 0; R' = R if H = E

    R, R' (n, d) = 0 at the start. Rows that the base's files lack are the mean of the others in E and in H.

Trains n * d parameters, 2 n * d with a head of its own. Folds: E and H get the rows.
Letters: V vocabulary with the new tokens, n of them, d model width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.affine import Affine
from litpeft.model.context import Context
from litpeft.model.gpt import GPT
from litpeft.model.slots import Delta, Embedding, Linear, TiedHead

TABLES = ("embed.weight", "head.weight", "head.bias")  # which have a row for each token


class AddedRows(Delta):
    """R, of the rows from `first` on of a table of vectors; `of` is the embedding's if the head is the embedding."""

    def __init__(self, ids: Sequence[int], width: int, of: "AddedRows | None" = None):
        super().__init__()
        self.first, self.count, self.of = ids[0], len(ids), (of,)  # a tuple hides the module
        if of is None:
            self.tensor("rows", (len(ids), width), 0.0)

    def learned(self) -> Tensor:
        """Returns R (n, d)."""
        return self.rows if self.of[0] is None else self.of[0].rows

    def affine(self, table: Linear | Embedding) -> Affine:
        rows, total = self.learned(), table.weight.size(0) if isinstance(table, Embedding) else table.out_features
        place = torch.eye(self.count, dtype=rows.dtype, device=rows.device)
        return Affine(A=rows, B=F.pad(place, (0, 0, self.first, total - self.first - self.count)))

    def forward(self, y: Tensor, x: Tensor, table: Linear | Embedding, ctx: Context | None = None) -> Tensor:
        """In the embedding x are ids (B, T) and y their vectors; in the head x (..., d), and y are the logits."""
        rows, end = self.learned().to(y.dtype), self.first + self.count
        if isinstance(table, Embedding):
            new = (x >= self.first) & (x < end)
            return y + new[..., None] * rows[(x - self.first).clamp(0, self.count - 1)]
        return torch.cat((y[..., : self.first], y[..., self.first : end] + x.to(y.dtype) @ rows.T, y[..., end:]), -1)


def with_rows(table: Tensor, rows: int) -> Tensor:
    """Returns a table of a base's files with as many rows: those that it lacks are the mean of the others."""
    if rows == len(table):
        return table
    mean = table.to(torch.promote_types(table.dtype, torch.float32)).mean(0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(rows - len(table), *mean.shape[1:])))


def add_rows(model: GPT, ids: Sequence[int]) -> None:
    """Fills the slots of embedding and head."""
    rows, width = AddedRows(ids, model.config.d_model), model.config.d_model
    model.embed.slot.add("added_tokens", rows)
    tied = isinstance(model.head, TiedHead)
    model.head.slot.add("added_tokens", AddedRows(ids, width, rows if tied else None))
