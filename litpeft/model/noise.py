"""NEFTune: noise on the embedded tokens while a model trains, which keeps it from learning rows by heart.

    x + e alpha / sqrt(L d)        e uniform in [-1, 1], for a document of L tokens and a width d

https://arxiv.org/abs/2310.05914
"""

import math

import torch
from torch import Tensor

from litpeft.model.context import Context


def with_noise(x: Tensor, alpha: float, ctx: Context) -> Tensor:
    """Returns embedded tokens (B, T, d) with noise of this size, each document's by its own length."""
    lengths = [x.size(1)] if ctx.documents is None else ctx.documents.lengths
    sizes = torch.tensor([alpha / math.sqrt(max(1, length) * x.size(-1)) for length in lengths])
    sizes = sizes.repeat_interleave(torch.tensor(lengths))[:, None].to(x.device, non_blocking=True)
    return x + ((torch.rand_like(x, dtype=sizes.dtype) * 2 - 1) * sizes).to(x.dtype)
