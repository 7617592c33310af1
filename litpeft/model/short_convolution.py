"""A layer whose tokens read the last few tokens in place of all earlier ones: LFM2's short convolution.

    y = out(in_c x * convolution of the last tokens' in_b x * in_x x)

LFM2 https://arxiv.org/abs/2511.23404. Letters: B rows, T new tokens, d model width, W width of the convolution.
"""

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.recompute import Recomputed, again, is_marking
from litpeft.model.slots import Linear, project


class Convolution(nn.Module):
    """A weighted sum of each channel's numbers at a token and at the W - 1 tokens of its document before it."""

    def __init__(self, channels: int, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None


class ShortConvolution(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        sizes, d = config.layer(layer).convolution, config.d_model
        self.layer = layer
        self.in_b, self.in_c, self.in_x = (Linear(d, d, sizes.bias) for _ in range(3))
        self.conv = Convolution(d, sizes.width, sizes.bias)
        self.core = Core()
        self.out = Linear(d, d, sizes.bias)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        return [[self.in_b, self.in_c, self.in_x], [self.out]]

    def keys_and_values(self) -> list[Linear]:
        """Returns none: no token reads the keys and values of others."""
        return []

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.out(self.core(*project(x, ctx, *self.inputs()[0]), ctx, self), ctx)


class Core(nn.Module):
    """What a layer makes of its projections, without parameters of its own: autograd keeps its inputs only."""

    def forward(self, b: Tensor, c: Tensor, x: Tensor, ctx: Context, attn: ShortConvolution) -> Tensor:
        """b, c and x (B, T, d) -> (B, T, d)"""
        weights = attn.conv.weight, attn.conv.bias
        if ctx.cache is not None:
            cache = ctx.cache[attn.layer]
            before, _ = cache.earlier(ctx)
            inputs = torch.cat((before, (b * x).to(before.dtype)), 1)
            cache.remember(inputs, None, ctx)
            return c * convolved(inputs, *weights, None)
        if ctx.recompute or is_marking() or not torch.is_grad_enabled():
            return again(computed, b, c, x, *weights, ctx.pos)
        with Recomputed(marks=False) as kept:
            return kept.run(computed, b, c, x, *weights, ctx.pos)


def computed(b: Tensor, c: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor) -> Tensor:
    """Returns what `Core` does, for texts from their start."""
    before = x.new_zeros(len(x), weight.size(-1) - 1, x.size(2))
    return c * convolved(torch.cat((before, b * x), 1), weight, bias, pos)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    """Returns the convolution (B, T, d) of x (B, W - 1 + T, d), whose first tokens come before its own.

    With `pos` (B, T) no token sees one before position 0, which is another document's.
    """
    weight, width = weight[:, 0].to(x.dtype), weight.size(-1)
    tokens = x.size(1) - width + 1
    y = x[:, width - 1 :] * weight[:, -1]
    for back in range(1, width):
        earlier = x[:, width - 1 - back :][:, :tokens]
        earlier = earlier if pos is None else earlier.masked_fill((pos < back)[..., None], 0)
        y = torch.addcmul(y, earlier, weight[:, -1 - back])
    return y if bias is None else y + bias.to(y.dtype)
