"""The attention of a layer: queries, keys and values of the model's width, in heads.

Letters: B rows, T new tokens, D head size, d model width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.attention import attend
from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.kernels.ops import rotate
from litpeft.model.norms import RMS, make_qk_norm
from litpeft.model.recompute import again
from litpeft.model.slots import Linear, Slot, project


class Sdpa(Slot):
    """Softmax attention, or what a method puts in its place."""

    takes_one = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, attn: "Attention") -> Tensor:
        for delta in self.deltas.values():
            return delta(q, k, v, ctx, attn)
        return attend(q, k, v, mask=ctx.mask, documents=ctx.documents, **attn.kind())


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        kind, d = config.layer(layer), config.d_model
        self.layer, self.head_dim, self.window = layer, config.head_size(kind), kind.window
        self.keys_of, self.lends = kind.keys_of, any(other.keys_of == layer for other in config.layers)
        queries, kv = config.n_heads * self.head_dim, config.kv_heads(kind) * self.head_dim
        self.q = Linear(d, queries, config.qkv_bias)
        self.k = None if kind.keys_of is not None else Linear(d, kv, config.qkv_bias)
        self.v = None if kind.keys_of is not None or kind.values_are_keys else Linear(d, kv, config.qkv_bias)
        self.gate = Linear(d, queries, config.qkv_bias) if config.gated_attention else None
        self.o = Linear(queries, d, config.output_bias)
        self.core = Sdpa()
        self.sinks = nn.Parameter(torch.zeros(config.n_heads)) if config.sinks else None
        self.q_norm = make_qk_norm(config, config.n_heads, self.head_dim)
        self.k_norm = None if self.k is None else make_qk_norm(config, config.kv_heads(kind), self.head_dim)
        self.v_norm = RMS(self.head_dim, config.norm_eps) if config.value_norm and self.k is not None else None
        self.norms_all, self.norms_last = config.qk_norm == "all", config.qk_norm == "rotated"
        self.clip, self.cap = config.clip_qkv, config.score_cap
        self.paired = (
            config.rotary_size if config.rope_pairs else 0
        )  # first dimensions that rotate in pairs (2 i, 2 i + 1)
        # `attend` multiplies scores by head_dim ** -0.5, queries make up for the rest
        self.query_scale = None if config.score_scale is None else config.score_scale * self.head_dim**0.5

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def kind(self) -> dict[str, Any]:
        """Returns the arguments of `attend` that say what attention of this layer is."""
        return {"window": self.window, "cap": self.cap, "sinks": self.sinks}

    def normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Returns queries, keys or values (B, T, heads * D) as their norm makes them."""
        if self.norms_all and norm is not self.v_norm:
            return norm(x)
        return norm(x.unflatten(-1, (-1, self.head_dim))).flatten(-2)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        gate = [] if self.gate is None else [self.gate]
        return [[self.q, *gate, *self.keys_and_values()], [self.o]]

    def keys_and_values(self) -> list[Linear]:
        """Returns the layers that compute them: one if values are made of keys, none if another layer's are read."""
        return [linear for linear in (self.k, self.v) if linear is not None]

    def sized(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Returns queries, keys or values (B, T, heads * D), normed and clamped if the model does so."""
        x = x if norm is None else self.normed(x, norm)
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def marked(self, f: Callable[..., Tensor], x: Tensor, norm: nn.Module | None, *rest: Context) -> Tensor:
        """Returns f(x, norm, ...), by `again` if that saves memory: a rotation alone keeps no more than its result."""
        return f(x, norm, *rest) if norm is None and self.clip is None else again(f, x, norm, *rest)

    def turned(self, x: Tensor, norm: nn.Module | None, ctx: Context) -> Tensor:
        """Returns queries or keys (B, heads, T, D), with their positions, of x (B, T, heads * D)."""
        x = self.heads(self.sized(x, None if self.norms_last else norm))
        if ctx.rope is not None:
            x = rotate(halves(x, self.paired) if self.paired else x, *ctx.rope)
        return norm(x) if self.norms_last else x

    def queries(self, x: Tensor, norm: nn.Module | None, ctx: Context) -> Tensor:
        """Returns queries as `turned` does, scaled."""
        q = self.turned(x, norm, ctx)
        q = q if self.query_scale is None else q * self.query_scale
        return q if ctx.query_growth is None else q * ctx.query_growth

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, *own = project(x, ctx, *self.inputs()[0])
        gate = None if self.gate is None else own.pop(0)
        q = self.marked(self.queries, q, self.q_norm, ctx)
        if own:
            k = self.marked(self.turned, own[0], self.k_norm, ctx)
            v = self.heads(self.marked(self.sized, own[-1], self.v_norm))
            if ctx.cache is not None:
                k, v = ctx.cache[self.layer].update(k, v, ctx)
            if self.lends:
                ctx.shared[self.layer] = k, v
        else:
            k, v = ctx.shared[self.keys_of]
        y = self.core(q, k, v, ctx, self).transpose(1, 2).flatten(2)
        return self.o(y if gate is None else again(gated, y, gate), ctx)


def gated(y: Tensor, gate: Tensor) -> Tensor:
    return y * gate.sigmoid()


def halves(x: Tensor, size: int) -> Tensor:
    """Returns x (B, heads, T, D) with its first `size` dimensions in the order 0, 2, 4, ... 1, 3, 5, ...

    Then `rotate` turns what were pairs (2 i, 2 i + 1). The products of queries and keys do not change.
    """
    turning = x[..., :size].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return turning if size == x.size(-1) else torch.cat((turning, x[..., size:]), -1)
