"""A decoder-only transformer whose slots are the only trace of finetuning.

Letters: B rows, T new tokens, S keys, D head size, R of them that rotate, d model width, H query heads,
G key/value heads, V vocabulary. Families differ in the switches of ModelConfig.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.model.attention import attend
from litpeft.model.config import ModelConfig, RopeScaling
from litpeft.model.context import Context
from litpeft.model.kernels.ops import recompute_output, rms_norm, rotate, swiglu, use_eager
from litpeft.model.loss import summed_cross_entropy
from litpeft.model.slots import Embedding, Linear, Slot, TiedHead, project

ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def rope_frequencies(size: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Returns the rotary frequencies (size/2,) in radians a token; in float32, like those models were trained with."""
    exponent = torch.arange(0, size, 2, device=device).float() / size
    frequency = 1.0 / theta**exponent
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: long wavelengths are stretched, short ones kept, those between interpolated
    turns = scaling.original_positions * frequency / (2 * math.pi)  # over the length that the model was trained on
    mix = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    mix = mix.clamp(0, 1)
    return mix * frequency + (1 - mix) * frequency / scaling.factor


class Sdpa(Slot):
    """Softmax attention, or what a method puts in its place."""

    takes_one = True

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, attn: "Attention") -> Tensor:
        for delta in self.deltas.values():
            return delta(q, k, v, ctx, attn)
        return attend(q, k, v, mask=ctx.mask, documents=ctx.documents, window=attn.window)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight; a weight that trains is float32 whatever x is."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / deviation(x) * weight + bias; parameters that train are float32 whatever x is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Returns a norm over the model's width."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.d_model, config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.window = layer, config.head_dim, config.window
        d, kv = config.d_model, config.n_kv_heads * config.head_dim
        self.q = Linear(d, config.n_heads * config.head_dim, config.qkv_bias)
        self.k = Linear(d, kv, config.qkv_bias)
        self.v = Linear(d, kv, config.qkv_bias)
        self.o = Linear(config.n_heads * config.head_dim, d, config.output_bias)
        self.core = Sdpa()

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        q, k, v = (self.heads(y) for y in project(x, ctx, self.q, self.k, self.v))
        if ctx.rope is not None:
            q, k = rotate(q, *ctx.rope), rotate(k, *ctx.rope)
        if ctx.cache is not None:
            k, v = ctx.cache[self.layer].update(k, v, ctx)
        return self.o(self.core(q, k, v, ctx, self).transpose(1, 2).flatten(2), ctx)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.activation]
        self.gate = Linear(config.d_model, config.d_ff, config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(config.d_model, config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, config.mlp_bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.gate is None:
            return self.down(self.act(self.up(x, ctx)), ctx)
        gate, up = project(x, ctx, self.gate, self.up)
        if self.act is not F.silu:
            return self.down(self.act(gate) * up, ctx)
        y = swiglu(gate, up)
        if use_eager() or ctx.recompute:  # no backward pass, or checkpointed
            return self.down(y, ctx)
        with recompute_output(y, partial(swiglu, gate.detach(), up.detach())):  # saves a fifth of activation memory
            return self.down(y, ctx)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1 = make_norm(config)
        self.attn = Attention(config, layer)
        self.after_attn = Slot()
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)
        self.after_mlp = Slot()
        self.after_block = Slot()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        h = self.norm1(x)
        y = x + self.after_attn(self.attn(h, ctx), h, ctx)
        h = self.norm2(x if self.parallel else y)
        y = y + self.after_mlp(self.mlp(h, ctx), h, ctx)
        return self.after_block(y, ctx)


def run_block(block: Block, x: Tensor, ctx: Context) -> Tensor:
    """Returns a block's output for x (B, T, d)."""
    return block(x, ctx)


class GPT(nn.Module):
    """Token ids in, logits or a loss out. Parameters are named as in families/*.py, whatever method is attached."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype | None = None  # of frozen weights and activations; None = the embedding's
        self.recompute = False  # activation checkpointing: keep only a block's input for the backward pass
        self.compiled: Callable[[Block, Tensor, Context], Tensor] | None = None  # `run_block`, by train/compiled.py
        self.fused: Callable[[Block, Tensor, Context], Tensor | None] | None = None  # by train/fused_block.py, on GPUs
        self.files: Weights | None = None  # that the weights were read from; set by build.py
        self.base_keys: set[str] = set()  # these four are set by delta.py
        self.delta_keys: set[str] = set()
        self.training_keys: set[str] = set()
        self.base_values: dict[str, Tensor] = {}  # of base parameters that a loaded delta replaced
        self.banks = nn.ModuleDict()  # what deltas share (slots.Bank), by the name of their method
        self.embed = Embedding(config.vocab_size, config.d_model)
        self.positions = Embedding(config.max_positions, config.d_model) if config.learned_positions else None
        self.after_embed = Slot()
        self.rope = Slot()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = TiedHead(self.embed) if config.tie_embeddings else Linear(config.d_model, config.vocab_size)

    @property
    def learned_keys(self) -> int:
        """Returns how many first positions of each document have learned keys; those are not rotated."""
        return self.blocks[0].attn.k.slot.virtual_tokens

    @property
    def virtual_tokens(self) -> int:
        """Returns how many first positions of each document hold learned vectors; the text follows them."""
        return max(self.after_embed.virtual_tokens, self.learned_keys)

    @property
    def frame(self) -> tuple[int, int]:
        """Returns how many positions of learned vectors stand before each document, and after its prompt."""
        return self.virtual_tokens, self.after_embed.infix_tokens

    @property
    def max_positions(self) -> int:
        """Returns how many positions a document can have."""
        return int(self.config.max_positions * self.rope.stretch)

    @property
    def reach(self) -> int:
        """Returns how many tokens of one document can be read."""
        return self.max_positions - sum(self.frame)

    def forward(
        self, ids: Tensor, ctx: Context | None = None, at: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Returns logits (B, T, V); (N, V) at flattened positions `at` (N,); with `targets` (N,) the summed loss.

        Logits are computed for these positions only, and a loss never holds all of them.
        """
        ctx = ctx or Context.rows(ids)
        ctx.virtual_tokens = self.virtual_tokens
        x = self.after_embed(self.embed(ids).to(self.dtype), ctx)
        if self.positions is not None:
            if ctx.reach() > self.config.max_positions:
                what = f"{ctx.reach()} tokens are more than the {self.config.max_positions} positions of this model"
                raise ModelError(what, hint="give it shorter texts")
            x = x + self.positions(ctx.pos).to(x.dtype)
        if self.config.rotary_size:
            pos = ctx.pos.masked_fill(ctx.pos < self.learned_keys, 0) if self.learned_keys else ctx.pos
            rope = self.config.rotary_size, self.config.rope_theta, self.config.rope_scaling
            angle = pos[:, None, :, None].float() * self.rope(rope_frequencies(*rope, ids.device))
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            ctx.rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if ctx.cache is not None:
            ctx.look_back(ids.size(1), self.config.window, x.dtype)
        ctx.recompute = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            fused = self.fused(block, x, ctx) if self.fused is not None and torch.is_grad_enabled() else None
            if fused is not None:
                x = fused
                continue
            # only an x with a gradient: evaluation, and the first block above a frozen embedding, would compile anew
            step = self.compiled if self.compiled is not None and x.requires_grad else run_block
            x = checkpoint(step, block, x, ctx, use_reentrant=False) if ctx.recompute else step(block, x, ctx)
        x = self.norm(x if at is None else x.flatten(0, 1)[at])
        return self.head(x) if targets is None else summed_cross_entropy(self.head, x, targets)
