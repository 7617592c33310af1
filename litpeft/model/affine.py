"""The affine map that the deltas of a linear layer apply to its output.

Letters: out and in of the layer, r rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Affine:
    """y <- gain * y + B A x + shift, for input x and output y = W x + b of a linear layer; None leaves a term out."""

    gain: Tensor | None = None  # (out,)
    A: Tensor | None = None  # (r, in), there with B
    B: Tensor | None = None  # (out, r)
    shift: Tensor | None = None  # (out,)

    def after(self, first: "Affine") -> "Affine":
        """Returns the composition: `first` is applied, then this one."""
        gain, a, b, shift = first.gain, first.A, first.B, first.shift
        if self.gain is not None:
            gain = self.gain if gain is None else self.gain * gain
            b, shift = None if b is None else self.gain[:, None] * b, None if shift is None else self.gain * shift
        if self.A is not None:
            a, b = (self.A, self.B) if a is None else (torch.cat((a, self.A)), torch.cat((b, self.B), 1))
        if self.shift is not None:
            shift = self.shift if shift is None else shift + self.shift
        return Affine(gain, a, b, shift)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns weight (out, in), changed in place, and bias (out,) of a layer that computes W x + b and this map."""
        gain, a, b, shift = (None if t is None else t.to(weight.dtype) for t in (self.gain, self.A, self.B, self.shift))
        if gain is not None:
            weight, bias = weight.mul_(gain[:, None]), None if bias is None else gain * bias
        if a is not None:
            weight = weight.addmm_(b, a)
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return weight, bias

    @staticmethod
    def concatenate(parts: Sequence["Affine"], sizes: Sequence[int]) -> "Affine":
        """Returns one Affine for layers that read the same x: its output is the concatenation of theirs."""
        like = next((t for part in parts for t in (part.gain, part.B, part.shift) if t is not None), torch.empty(0))
        each = list(zip(parts, sizes, strict=True))
        gain = [like.new_ones(size) if part.gain is None else part.gain for part, size in each]
        shift = [like.new_zeros(size) if part.shift is None else part.shift for part, size in each]
        a = [part.A for part in parts if part.A is not None]
        b = [like.new_empty(size, 0) if part.B is None else part.B for part, size in each]
        return Affine(
            torch.cat(gain) if any(part.gain is not None for part in parts) else None,
            torch.cat(a) if a else None,
            torch.block_diag(*b) if a else None,
            torch.cat(shift) if any(part.shift is not None for part in parts) else None,
        )


def as_product(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Returns B (out, r) and A (r, in) whose product is a matrix of full rank: one of them is the identity."""
    one = torch.eye(min(matrix.shape), dtype=matrix.dtype, device=matrix.device)
    return (one, matrix) if len(matrix) < matrix.size(1) else (matrix, one)
