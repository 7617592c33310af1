"""Multi-head latent attention: queries, keys and values are made of vectors that are shorter than all heads together.

    c = norm(A x)      [k_still; v] = B c of each head        k = [k_still; turned(a x)], a x for all heads
    q = B' norm(A' x)  or W x, of which a part of each head turns with the position

Here keys and values are computed for each token when it is read, and the KV cache holds those of all heads: it takes
more memory than c and a x would, and attention is the same code as in all other models.

Letters: B rows, T new tokens, H heads, D size of a head of queries and keys, d model width.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.kernels.ops import rotate
from litpeft.model.multi_head import Attention, Sdpa, halves
from litpeft.model.norms import RMSNorm
from litpeft.model.parts import LATENT_EPS
from litpeft.model.recompute import again
from litpeft.model.slots import Linear, project


class LatentAttention(Attention):
    """Its linear layers are `q_a` and `q_b`, or `q` alone, `kv_a`, `kv_b` and `o`."""

    k = v = None

    def __init__(self, config: ModelConfig, layer: int):
        nn.Module.__init__(self)
        sizes, d, heads = config.latent, config.d_model, config.n_heads
        self.layer, self.window, self.head_dim, self.sizes = layer, config.layer(layer).window, config.head_dim, sizes
        if sizes.q_rank is None:
            self.q, self.q_a, self.q_norm, self.q_b = Linear(d, heads * self.head_dim), None, None, None
        else:
            self.q, self.q_a = None, Linear(d, sizes.q_rank, config.qkv_bias)
            self.q_norm, self.q_b = RMSNorm(sizes.q_rank, LATENT_EPS), Linear(sizes.q_rank, heads * self.head_dim)
        self.kv_a = Linear(d, sizes.kv_rank + sizes.turning, config.qkv_bias)
        self.kv_norm = RMSNorm(sizes.kv_rank, LATENT_EPS)
        self.kv_b = Linear(sizes.kv_rank, heads * (sizes.still + sizes.values))
        self.core = Sdpa()
        self.o = Linear(heads * sizes.values, d, config.output_bias)
        self.sinks, self.cap, self.paired = None, config.score_cap, config.rope_pairs
        self.query_scale = None if config.score_scale is None else config.score_scale * self.head_dim**0.5

    def inputs(self) -> list[list[Linear]]:
        if self.q_a is None:
            return [[self.q, self.kv_a], [self.kv_b], [self.o]]
        return [[self.q_a, self.kv_a], [self.q_b], [self.kv_b], [self.o]]

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        sizes = self.sizes
        q, latent = project(x, ctx, *self.inputs()[0])
        if self.q_b is not None:
            q = self.q_b(again(self.q_norm, q), ctx)
        latent, turning = latent.split((sizes.kv_rank, sizes.turning), -1)
        q_still, q_turning = self.heads(q).split((sizes.still, sizes.turning), -1)
        both = (
            self.kv_b(again(self.kv_norm, latent), ctx).unflatten(-1, (-1, sizes.still + sizes.values)).transpose(1, 2)
        )
        k_still, v = both.split((sizes.still, sizes.values), -1)
        k_turning = self.at_positions(turning[:, None], ctx).expand(-1, k_still.size(1), -1, -1)
        q = torch.cat((self.at_positions(q_turning, ctx), q_still), -1)
        k = torch.cat((k_turning, k_still), -1)
        if self.query_scale is not None:
            q = q * self.query_scale
        v = F.pad(v, (0, self.head_dim - sizes.values))  # not all of torch's kernels take heads of two sizes
        if ctx.cache is not None:
            k, v = ctx.cache[self.layer].update(k, v, ctx)
        y = self.core(q, k, v, ctx, self)[..., : sizes.values]
        return self.o(y.transpose(1, 2).flatten(2), ctx)

    def at_positions(self, x: Tensor, ctx: Context) -> Tensor:
        """Returns x (B, heads, T, size), turned."""
        return rotate(halves(x, x.size(-1)) if self.paired else x, *ctx.rope)
