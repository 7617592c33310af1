"""The largest singular parts of a matrix, and of vectors that come a few at a time."""

import torch
from torch import Tensor

ITERATIONS = 17  # of subspace iteration


def singular_parts(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first singular parts of a matrix (out, in): U (out, count), S (count,) and V (in, count).

    By subspace iteration, whose cost grows with the count, that of all singular parts with the width. It starts from
    the same random numbers on every device and in every type, and the largest number of each column of U is positive:
    a method that starts from them learns the same on a GPU as on a CPU, but for rounding.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(matrix.size(1), count, generator=generator, dtype=torch.float64).to(matrix)
    for _ in range(ITERATIONS):
        u, _ = torch.linalg.qr(matrix @ v)
        v, r = torch.linalg.qr(matrix.T @ u)  # so that u^T matrix = r^T v^T
    left, s, right = torch.linalg.svd(r.T)
    u, v = u @ left, v @ right.T
    signs = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1, 1).to(u)
    return u * signs, s, v * signs


def largest(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Returns A (rank, in) and B (out, rank) whose product is the nearest of that rank to a weight (out, in)."""
    u, s, v = singular_parts(weight, min(*weight.shape, 2 * rank + 32))
    root = s[:rank].sqrt()
    return root[:, None] * v[:, :rank].T, u[:, :rank] * root


def largest_weighted(weight: Tensor, rank: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B whose errors are the least where each is multiplied by its row's and its column's weight.

    `rows` are (out, 1), `columns` (1, in), all above 0.
    """
    a, b = largest(rows * weight * columns, rank)
    return a / columns, b / rows


class Components:
    """The largest principal components of vectors that come in parts, as by Ross et al. (2008)."""

    def __init__(self, size: int, most: int):
        self.most, self.count, self.total = most, 0, 0.0  # total: the sum of the squared distances from the mean
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.parts = torch.zeros(0, size, dtype=torch.float64)  # (k, size) components times their singular values

    def add(self, x: Tensor) -> None:
        """Takes vectors (n, size) into account."""
        x, both = x.to("cpu", torch.float64), self.count + len(x)
        mean = x.mean(0)
        moved = (self.count * len(x) / both) ** 0.5 * (self.mean - mean)
        new = torch.cat((x - mean, moved[None]))
        self.total += float(new.square().sum())
        self.mean += len(x) / both * (mean - self.mean)
        self.count = both
        rows = torch.cat((self.parts, new))
        _, u = torch.linalg.eigh(rows @ rows.T)  # rows = U S V^T, and U^T rows = S V^T
        self.parts = u[:, -self.most :].flip(1).T @ rows

    def shares(self) -> Tensor:
        """Returns the share of the variance that each component explains (k,)."""
        return self.parts.square().sum(1) / max(self.total, 1e-30)

    def directions(self, count: int) -> Tensor:
        """Returns the first of the components, each of length 1 (count, size)."""
        parts = self.parts[:count]
        return parts / parts.norm(dim=1, keepdim=True).clamp_min(1e-30)
