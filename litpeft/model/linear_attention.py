"""A layer whose tokens read one matrix for each head in place of all earlier keys and values: Gated DeltaNet.

    [q; k; v] = silu(convolution of the last tokens' in_q x, in_k x, in_v x)        q, k of length 1, then q / sqrt(K)
    b = sigmoid(in_b x)        log g = -exp(A_log) softplus(in_a x + dt_bias)
    y = out(norm(gated_delta_rule(q, k, v, g, b)) * silu(in_z x))

Letters: B rows, T new tokens, H heads of values, K size of a key, V size of a value, W width of the convolution.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.delta_rule import Chunks, gated_delta_rule
from litpeft.model.kernels.ops import rms_norm
from litpeft.model.recompute import Recomputed, again, is_marking
from litpeft.model.slots import Linear, project

LENGTH_EPS = 1e-6  # of queries and keys, whatever the model's


class GatedNorm(nn.Module):
    """x / rms(x) * weight * silu(z), over the values of each head."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """x (B, T, H, V) in float32 or better and z (B, T, H * V) -> (B, T, H * V), in the type of z."""
        z_ = z.to(x.dtype).view_as(x)
        return (rms_norm(x, self.weight, self.eps) * F.silu(z_)).flatten(2).to(z.dtype)


class Convolution(nn.Module):
    """A weighted sum of each channel's numbers at a token and at the W - 1 tokens of its document before it."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))


def convolved(x: Tensor, weight: Tensor, pos: Tensor, before: Tensor | None = None) -> Tensor:
    """Returns the sums for x (B, T, channels) at `pos` (B, T); `before` (B, W - 1, channels) comes before x."""
    tokens, width = x.size(1), weight.size(-1)
    before = x.new_zeros(len(x), width - 1, x.size(2)) if before is None else before.to(x.dtype)
    x, weight = torch.cat((before, x), 1), weight[:, 0].to(x.dtype)
    y = x[:, width - 1 :] * weight[:, -1]
    for back in range(1, width):
        earlier = x[:, width - 1 - back :][:, :tokens] * weight[:, -1 - back]
        y = y + earlier.masked_fill((pos < back)[..., None], 0)
    return y


class Core(nn.Module):
    """What a layer makes of its projections, without parameters of its own: autograd keeps its inputs only."""

    def forward(self, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, ctx: Context, attn: "GatedDeltaNet") -> Tensor:
        """qkv (B, T, 2 * key heads * K + H * V), z (B, T, H * V), a and b (B, T, H) -> (B, T, H * V)"""
        inputs = qkv, b, a, attn.conv.weight, attn.A_log, attn.dt_bias, ctx.pos, ctx.chunks
        if ctx.cache is not None:
            return attn.norm(ctx.cache[attn.layer].update(attn.remembered, inputs, ctx), z)
        if ctx.recompute or is_marking() or not torch.is_grad_enabled():
            return again(attn.norm, again(attn.computed, *inputs), z)
        with Recomputed(marks=False) as kept:
            return kept.run(attn.norm, kept.run(attn.computed, *inputs), z)


class GatedDeltaNet(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        sizes, d = config.layer(layer).linear, config.d_model
        self.layer, self.sizes = layer, sizes
        keys, values = sizes.key_heads * sizes.key_size, sizes.heads * sizes.value_size
        self.in_q, self.in_k, self.in_v = Linear(d, keys), Linear(d, keys), Linear(d, values)
        self.in_z, self.in_b, self.in_a = Linear(d, values), Linear(d, sizes.heads), Linear(d, sizes.heads)
        self.conv = Convolution(2 * keys + values, sizes.width)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(sizes.heads)), nn.Parameter(torch.ones(sizes.heads))
        self.core = Core()
        self.norm = GatedNorm(sizes.value_size, config.norm_eps)
        self.out = Linear(values, d)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        return [[self.in_q, self.in_k, self.in_v, self.in_z, self.in_b, self.in_a], [self.out]]

    def keys_and_values(self) -> list[Linear]:
        """Returns none: no token reads the keys and values of others."""
        return []

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v, z, b, a = project(x, ctx, *self.inputs()[0])
        return self.out(self.core(torch.cat((q, k, v), -1), z, b, a, ctx, self), ctx)

    def computed(self, *inputs: Tensor | Chunks) -> Tensor:
        """Returns y (B, T, H, V) of texts from their start, for the inputs of `remembered`."""
        return self.remembered(*inputs)[0]

    def remembered(
        self,
        qkv: Tensor,
        b: Tensor,
        a: Tensor,
        weight: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        pos: Tensor,
        chunks: Chunks,
        before: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns y (B, T, H, V), and each document's S (documents, H, K, V) at its end.

        Where a text goes on, `before` (B, W - 1, ...) are the last tokens' qkv, and `memory` is S.
        """
        sizes, wide = self.sizes, torch.promote_types(qkv.dtype, torch.float32)
        keys, per_key = sizes.key_heads * sizes.key_size, sizes.heads // sizes.key_heads
        with torch.autocast(qkv.device.type, enabled=False):
            qkv = F.silu(convolved(qkv.to(wide), weight, pos, before)).flatten(0, 1)
            q, k, v = qkv.split((keys, keys, sizes.heads * sizes.value_size), -1)
            q, k = (unit(x.unflatten(-1, (-1, sizes.key_size))) for x in (q, k))
            q, k = ((x.repeat_interleave(per_key, 1) if per_key > 1 else x) for x in (q * sizes.key_size**-0.5, k))
            fade = -A_log.to(wide).exp() * F.softplus(a.to(wide) + dt_bias.to(wide))
            v, write = v.unflatten(-1, (-1, sizes.value_size)), b.to(wide).sigmoid()
            y, memory = gated_delta_rule(q, k, v, fade.flatten(0, 1), write.flatten(0, 1), chunks, memory)
        return y.unflatten(0, pos.shape), memory


def unit(x: Tensor) -> Tensor:
    """Returns x (..., K) divided by its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
