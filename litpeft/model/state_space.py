"""Mamba-2's layer: each head has one matrix S, which every token fades, writes to and reads. Its input is u.

    x, B, C = silu(conv(in_x u)), silu(conv(in_b u)), silu(conv(in_c u))
    dt = softplus(in_dt u + dt_bias), within limits
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T        S_0 = 0
    y_t = S_t^T C_t + D x_t
    out(norm(y * silu(in_z u)))

Some models take norm(y) * silu(in_z u) in the last line, others have no norm.

`conv` sums each channel over the last W tokens, with weights. Heads of one group have B and C in common, and the norm
is over the heads of a group. The chunks are those of Dao and Gu 2024, https://arxiv.org/abs/2405.21060: within a chunk
each token reads those before it, and S is computed once a chunk.

Letters: B rows, T new tokens of each, M chunks, C tokens of a chunk, W width of the convolution, F its channels.
H heads, P size of a head, G groups, R = H / G heads of each, K size of B and C.
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
from litpeft.model.norms import GatedNorm
from litpeft.model.parts import Beside, StateSpace
from litpeft.model.short_convolution import Convolution
from litpeft.model.slots import Linear, project


class Mamba2(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        sizes, d = config.layer(layer).state_space, config.d_model
        beside = config.layer(layer).beside or Beside()
        self.layer, self.sizes, self.scale, self.scales = layer, sizes, beside.state_in, beside.parts
        widths = sizes.inner, sizes.inner, sizes.groups * sizes.state, sizes.groups * sizes.state, sizes.heads
        made = (Linear(d, width, sizes.in_bias) for width in widths)
        self.in_z, self.in_x, self.in_b, self.in_c, self.in_dt = made
        self.conv = Convolution(sizes.channels, sizes.width, sizes.conv_bias)
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(sizes.heads)), nn.Parameter(torch.ones(sizes.heads))
        self.D = nn.Parameter(torch.ones(sizes.heads))
        self.core = Core()
        self.norm = None if sizes.norm is None else GatedNorm(sizes.inner)
        self.out = Linear(sizes.inner, d, sizes.out_bias)
        self.piece = partial(piece, sizes=sizes, eps=config.norm_eps)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        return [[self.in_z, self.in_x, self.in_b, self.in_c, self.in_dt], [self.out]]

    def keys_and_values(self) -> list[Linear]:
        """Returns none: no token reads the keys and values of others."""
        return []

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        parts = project(x if self.scale == 1 else x * self.scale, ctx, *self.inputs()[0])
        scaled = zip(parts, self.scales, strict=True)
        z, x, b, c, dt = (part if scale == 1 else part * scale for part, scale in scaled)
        norm = None if self.norm is None else self.norm.weight
        weights = self.conv.weight, self.conv.bias, self.A_log, self.dt_bias, self.D, norm
        return self.out(self.core((torch.cat((x, b, c), -1), z, dt), weights, ctx, self), ctx)


def piece(
    tokens: Sequence[Tensor], weights: Weights, group: Group, memory: Tensor, sizes: StateSpace, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C, H * P) of a group, and S of its documents (documents, G, K, R * P) after it, for S before it.

    `tokens` are xbc (M, W - 1 + C, F), z (M, C, H * P) and dt (M, C, H); `weights` those of the convolution (F, 1, W),
    its bias (F,) or None, A_log, dt_bias and D (H,), and the norm's (H * P,) or None.
    """
    with torch.autocast(memory.device.type, enabled=False):
        (xbc, z, dt), (conv, bias, A_log, dt_bias, D, norm), wide = tokens, weights, memory.dtype
        read = sizes.groups * sizes.state
        x, b, c = F.silu(group.convolved(xbc.to(wide), conv, bias)).split((sizes.inner, read, read), -1)
        b, c = (one.unflatten(-1, (sizes.groups, -1)).transpose(1, 2) for one in (b, c))
        x = x.unflatten(-1, (sizes.groups, -1, sizes.head_size))  # (M, C, G, R, P)
        dt = F.softplus(dt.to(wide) + dt_bias.to(wide)).clamp(sizes.least, sizes.most)
        dt = dt.where(group.real[..., None], 0).unflatten(-1, (sizes.groups, -1))  # (M, C, G, R)
        fade = -A_log.to(wide).exp().view(sizes.groups, -1) * dt
        y, memory = selective_scan(c, b, x * dt[..., None], fade, group.counts, memory)
        y = y + D.to(wide).view(sizes.groups, -1, 1) * x
        y, gate = y.flatten(3), F.silu(z.to(wide)).unflatten(-1, (sizes.groups, -1))  # (M, C, G, R * P)
        y = y if sizes.norm == "before" else y * gate
        if norm is not None:
            y = F.rms_norm(y, y.shape[-1:], None, eps) * norm.to(wide).view(sizes.groups, -1)
        return (y * gate if sizes.norm == "before" else y).flatten(2).to(z.dtype), memory


def selective_scan(
    c: Tensor, b: Tensor, x: Tensor, fade: Tensor, counts: Sequence[int], memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C, G, R, P) of the chunks of some steps, without D x, and each document's S after them.

    c and b are (M, G, C, K), x is (M, C, G, R, P), multiplied by dt; `fade` (M, C, G, R) is the logarithm of what S
    fades by. Both are 0 at places without a token. `memory` holds S (documents, G, K, R * P) before the steps, of the
    documents of the first one; `counts` says how many are in each.
    """
    total = fade.cumsum(1)
    past = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
    of_heads = total.permute(0, 2, 3, 1)  # (M, G, R, C)
    between = (of_heads[..., :, None] - of_heads[..., None, :]).masked_fill(~past, -torch.inf).exp()
    y = ((c @ b.mT)[:, :, None] * between @ x.permute(0, 2, 3, 1, 4)).permute(0, 3, 1, 2, 4)  # what the chunk wrote
    end = total[:, -1:]
    written = (x * (end - total).exp()[..., None]).flatten(3).transpose(1, 2)  # (M, G, C, R * P), as at the end
    faded = end.exp()[..., None].expand(-1, -1, -1, -1, x.size(-1)).flatten(3).transpose(1, 2)  # (M, G, 1, R * P)
    earlier, ended = [], []
    for c_, b_, written_, faded_ in zip(*(one.split(counts) for one in (c, b, written, faded)), strict=True):
        ended.append(memory[len(c_) :])  # of documents without a chunk more
        memory = memory[: len(c_)]
        earlier.append(c_ @ memory)
        memory = memory * faded_ + b_.mT @ written_
    earlier = torch.cat(earlier).transpose(1, 2).unflatten(-1, x.shape[-2:])  # what earlier chunks wrote
    return y + earlier * total.exp()[..., None], torch.cat([memory, *reversed(ended)])
