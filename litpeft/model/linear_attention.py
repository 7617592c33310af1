"""Linear attention: each head has one matrix, which a token reads in place of all earlier keys and values.

The layer makes queries, keys, values and two gates of its input x, and applies the gated delta rule to them.

    q, k, v = silu(conv(in_q x)), silu(conv(in_k x)), silu(conv(in_v x))
    q, k = q / |q| / sqrt(K), k / |k|
    b = sigmoid(in_b x)
    g = exp(-exp(A_log) softplus(in_a x + dt_bias))
    y = out(norm(gated_delta_rule(q, k, v, g, b)) * silu(in_z x))

`conv` sums each channel over the last W tokens, with weights. Gated DeltaNet https://arxiv.org/abs/2412.06464.

Letters: B rows, T new tokens of each, N tokens of all rows, M chunks, C tokens of a chunk.
H heads of values, K size of a key, V size of a value, F channels of q, k and v together.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.by_chunk import Core, Weights
from litpeft.model.chunks import Group
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.delta_rule import gated_delta_rule
from litpeft.model.norms import GatedNorm
from litpeft.model.parts import LinearAttention
from litpeft.model.short_convolution import Convolution
from litpeft.model.slots import Linear, project

LENGTH_EPS = 1e-6  # of queries and keys, whatever the model's


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        sizes, d = config.layer(layer).linear, config.d_model
        self.layer, self.sizes = layer, sizes
        keys, values = sizes.key_heads * sizes.key_size, sizes.heads * sizes.value_size
        self.in_q, self.in_k, self.in_v = Linear(d, keys), Linear(d, keys), Linear(d, values)
        self.in_z, self.in_b, self.in_a = Linear(d, values), Linear(d, sizes.heads), Linear(d, sizes.heads)
        self.conv = Convolution(sizes.channels, sizes.width)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(sizes.heads)), nn.Parameter(torch.ones(sizes.heads))
        self.core = Core()
        self.norm = GatedNorm(sizes.value_size)
        self.out = Linear(values, d)
        self.piece = partial(piece, sizes=sizes, eps=config.norm_eps)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        return [[self.in_q, self.in_k, self.in_v, self.in_z, self.in_b, self.in_a], [self.out]]

    def keys_and_values(self) -> list[Linear]:
        """Returns none: no token reads the keys and values of others."""
        return []

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v, z, b, a = project(x, ctx, *self.inputs()[0])
        weights = self.conv.weight, self.A_log, self.dt_bias, self.norm.weight
        return self.out(self.core((torch.cat((q, k, v), -1), z, b, a), weights, ctx, self), ctx)


def piece(
    tokens: Sequence[Tensor], weights: Weights, group: Group, memory: Tensor, sizes: LinearAttention, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C, H * V) of a group, and S of its documents (documents, H, K, V) after it, for S before it.

    `tokens` are qkv (M, W - 1 + C, F), z (M, C, H * V), b and a (M, C, H); `weights` those of the convolution
    (F, 1, W), A_log and dt_bias (H,) and the norm's (V,).
    """
    with torch.autocast(memory.device.type, enabled=False):
        (qkv, z, b, a), (conv, A_log, dt_bias, norm), wide = tokens, weights, memory.dtype
        keys, per_key = sizes.key_heads * sizes.key_size, sizes.heads // sizes.key_heads
        convolved = group.convolved(qkv.to(wide), conv, None)
        q, k, v = F.silu(convolved).split((keys, keys, sizes.heads * sizes.value_size), -1)
        q, k = (unit(x.unflatten(-1, (-1, sizes.key_size)).transpose(1, 2)) for x in (q, k))  # (M, heads, C, K)
        q, k = ((x.repeat_interleave(per_key, 1) if per_key > 1 else x) for x in (q * sizes.key_size**-0.5, k))
        v = v.unflatten(-1, (-1, sizes.value_size)).transpose(1, 2)
        fade = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
        fade, write = (x.where(group.real[..., None], 0).mT for x in (fade, b.to(wide).sigmoid()))
        y, memory = gated_delta_rule(q, k, v, fade, write, group.counts, memory)
        y = F.rms_norm(y, (sizes.value_size,), norm.to(wide), eps).transpose(1, 2).flatten(2)
        return (y * F.silu(z.to(wide))).to(z.dtype), memory


def unit(x: Tensor) -> Tensor:
    """Returns x (..., K) divided by its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
