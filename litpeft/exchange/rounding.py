"""What is lost where folded weights are rounded to the type of the files."""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 18  # weights that are compared together, so that they stay in the CPU's cache


@dataclass
class Rounding:
    """The effect of rounding the folded weights to the files' dtype."""

    changed: int = 0  # weights that differ from the base's after rounding
    total: int = 0  # weights of the tensors that the method changes
    lost: float = 0.0  # squared norm of the rounding error
    along: float = 0.0  # dot product of that error and the update
    update: float = 0.0  # squared norm of the update

    def add(self, exact: Tensor, rounded: Tensor, base: Tensor) -> None:
        changed = lost = along = update = 0.0
        for e, r, b in zip(*(tensor.flatten().split(CHUNK) for tensor in (exact, rounded, base)), strict=True):
            different = torch.ne(r, b.to(r.dtype), out=torch.empty(r.shape))  # floats: far faster to sum than booleans
            changed += float(different.sum())
            error, step = r - e, e - b
            lost += float(torch.linalg.vector_norm(error)) ** 2
            along += float(torch.dot(error, step))
            update += float(torch.linalg.vector_norm(step)) ** 2
        if update:
            self.changed, self.total = self.changed + int(changed), self.total + exact.numel()
            self.lost, self.along, self.update = self.lost + lost, self.along + along, self.update + update

    @property
    def error(self) -> float:
        """The norm of the error, relative to that of the update."""
        return (self.lost / self.update) ** 0.5 if self.update else 0.0

    @property
    def kept(self) -> float:
        """How much of the update is kept along its own direction; at 1 the error is only noise."""
        return 1 + self.along / self.update if self.update else 1.0

    def lines(self, dtype: str, exact: str, measured: bool) -> list[str]:
        """Returns the error as lines to print; the option `exact` avoids it.

        What it means for the result is a guess, left out where it was measured on held-out rows.
        """
        kept = f"kept along its own direction: {self.kept:.1%}"
        said = [f"relative error of the update, rounded to {dtype}: {self.error:.1%}; {kept}"]
        if measured:
            return said
        if self.kept < 0.9:
            said.append(f"  so a part of what was learned is lost: {exact} keeps it")
        elif self.error > 0.1:
            said.append(f"  so what was learned is kept, and the error is noise beside it; {exact} avoids it")
        return said
