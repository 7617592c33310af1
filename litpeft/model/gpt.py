"""A decoder-only transformer whose slots are the only trace of finetuning.

Letters: B rows, T new tokens, S keys, D head size, R of them that rotate, d model width, H query heads,
G key/value heads, V vocabulary. Families differ in the switches of ModelConfig.
"""

from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litpeft.core.errors import ModelError
from litpeft.core.kinds import Checkpointing
from litpeft.core.safetensors import Weights
from litpeft.model.config import Layer, ModelConfig
from litpeft.model.context import Context
from litpeft.model.frequencies import token_frequencies
from litpeft.model.kernels.ops import swiglu, use_eager
from litpeft.model.latent import LatentAttention
from litpeft.model.layer_inputs import LayerInput, LayerTable
from litpeft.model.linear_attention import GatedDeltaNet
from litpeft.model.loss import Objective, finished, summed_cross_entropy
from litpeft.model.mixture import Mixture
from litpeft.model.multi_head import Attention
from litpeft.model.noise import with_noise
from litpeft.model.norms import make_norm
from litpeft.model.recompute import Offloaded, Recomputed, again, is_marking
from litpeft.model.short_convolution import ShortConvolution
from litpeft.model.side_by_side import AttentionAndMamba
from litpeft.model.slots import Embedding, Linear, Slot, TiedHead, project
from litpeft.model.state_space import Mamba2
from litpeft.model.xielu import XIELU

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class MLP(nn.Module):
    """A layer's MLP, or an expert; `ctx` is None in an expert, whose x are only some of the call's tokens."""

    def __init__(self, config: ModelConfig, d_ff: int | None = None):
        super().__init__()
        d, d_ff = config.d_model, d_ff or config.d_ff
        self.act = None if config.clamped_gate else ACTIVATIONS.get(config.activation) or XIELU()
        self.clamped, self.scales = config.clamped_gate, config.mlp_scales
        self.gate = Linear(d, d_ff, config.mlp_bias) if config.gated_mlp else None
        self.up = Linear(d, d_ff, config.mlp_bias)
        self.down = Linear(d_ff, d, config.mlp_bias)

    def inputs(self) -> list[list[Linear]]:
        """Returns the linear layers, grouped by the input that they read."""
        return [[self.up] if self.gate is None else [self.gate, self.up], [self.down]]

    def forward(self, x: Tensor, ctx: Context | None) -> Tensor:
        if self.gate is None:
            return self.down(again(self.act, self.up(x, ctx)), ctx)
        gate, up = project(x, ctx, self.gate, self.up)
        if self.scales is not None:
            return self.down(again(self.gated, gate * self.scales[0], up), ctx) * self.scales[1]
        if self.act is not F.silu or use_eager() or is_marking() or ctx is None or ctx.recompute:
            return self.down(again(self.gated, gate, up), ctx)
        with Recomputed(marks=False) as kept:  # saves a fifth of activation memory
            return self.down(kept.run(swiglu, gate, up), ctx)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Returns the activation of a gated MLP."""
        if self.clamped is not None:
            slope, limit = self.clamped.slope, self.clamped.limit
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            return (up + 1) * gate * torch.sigmoid(slope * gate)
        return swiglu(gate, up) if self.act is F.silu else self.act(gate) * up


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        before = (lambda: make_norm(config)) if config.norms != "after" else nn.Identity
        after = (lambda: make_norm(config)) if config.norms != "before" else lambda: None
        self.parallel, self.scale, only = config.parallel_residual, config.residual_scale, config.layer(layer).only
        self.norm1 = self.attn = self.post_norm1 = self.after_attn = None  # of a layer that is an MLP alone
        if only != "mlp":
            self.norm1 = before()
            self.attn = mixer(config, layer)(config, layer)
            self.post_norm1 = after()
            self.after_attn = Slot()
        self.norm2 = self.mlp = self.post_norm2 = self.after_mlp = None  # of one without
        if only != "mixer":
            self.norm2 = None if config.shared_norm else before()
            self.mlp = Mixture(config, MLP) if config.has_experts(layer) else MLP(config, config.layer(layer).d_ff)
            self.post_norm2 = after()
            self.after_mlp = Slot()
        self.input = LayerInput(config, ACTIVATIONS[config.activation]) if config.layer_inputs else None
        self.register_buffer("layer_scalar", torch.ones(1) if config.layer_scale else None)
        self.after_block = Slot()

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = x
        if self.attn is not None:
            h = again(self.norm1, x)
            y = self.added(x, self.attn(h, ctx), self.post_norm1, self.after_attn, h, ctx)
        if self.mlp is not None:
            if self.norm2 is not None:
                h = again(self.norm2, x if self.parallel else y)
            y = self.added(y, self.mlp(h, ctx), self.post_norm2, self.after_mlp, h, ctx)
        if self.input is not None:
            y = y + self.input(y, ctx)
        if self.layer_scalar is not None:
            y = y * self.layer_scalar.to(y.dtype)
        return self.after_block(y, ctx)

    def added(self, x: Tensor, y: Tensor, norm: nn.Module | None, slot: Slot, h: Tensor, ctx: Context) -> Tensor:
        """Returns x plus what comes of the output y of a sub-layer whose input is h."""
        y = slot(y if norm is None else again(norm, y), h, ctx)
        return x + y if self.scale == 1 else x + y * self.scale


def mixer(config: ModelConfig, layer: int) -> type[nn.Module]:
    """Returns the class of the part of a layer in which tokens read others."""
    kind = config.layer(layer)
    if kind.beside is not None:
        return AttentionAndMamba
    if kind.attends:
        return Attention if config.latent is None else LatentAttention
    return ShortConvolution if kind.convolution else GatedDeltaNet if kind.linear else Mamba2


def run_block(block: Block, x: Tensor, ctx: Context) -> Tensor:
    """Returns a block's output for x (B, T, d)."""
    return block(x, ctx)


class GPT(nn.Module):
    """Token ids in, logits or a loss out. Parameters are named as in families/*.py, whatever method is attached."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.dtype: torch.dtype | None = None  # of frozen weights and activations; None = the embedding's
        self.noise = 0.0  # on embedded tokens in training
        self.recompute: Checkpointing = "none"  # activation checkpointing: what a block keeps for its backward pass
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
        self.layer_inputs = LayerTable(config) if config.layer_inputs else None
        self.after_embed = Slot()
        self.rope = Slot()
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = (
            TiedHead(self.embed)
            if config.tie_embeddings
            else Linear(config.d_model, config.vocab_size, config.head_bias)
        )
        layers = [config.layer(number) for number in range(config.n_layers)]
        self.kinds = tuple(dict.fromkeys(layers))  # of layers
        self.kind_of = [self.kinds.index(layer) for layer in layers]

    @property
    def learned_keys(self) -> int:
        """Returns how many first positions of each document have learned keys; those are not rotated."""
        attn = self.blocks[0].attn  # methods that learn keys learn those of all layers
        return max([0, *(linear.slot.virtual_tokens for linear in attn.keys_and_values())]) if attn is not None else 0

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
        self,
        ids: Tensor,
        ctx: Context | None = None,
        at: Tensor | None = None,
        targets: Tensor | None = None,
        weights: Callable[[], Tensor] | None = None,
        objective: Objective | None = None,
        headless: bool = False,
    ) -> Tensor:
        """Returns logits (B, T, V); (N, V) at flattened positions `at` (N,); with `targets` (N,) the summed loss.

        Logits are computed for these positions only, and a loss never holds all of them. `weights` returns those of the
        targets in the loss, (N,) float64; a function, since Fabric would round a tensor in bf16-mixed. With an
        `objective`, which takes the losses of all targets (N,), its value is returned. `headless`: returns (B, T, d)
        or (N, d), of which `logits` makes the logits, a part at a time where all would be too many.
        """
        ctx = ctx or Context.rows(ids)
        ctx.virtual_tokens = self.virtual_tokens
        x = self.embed(ids).to(self.dtype)
        if self.config.embed_scale != 1:  # rounded to the type of x, as it was in the model's training
            x = x * torch.full((), self.config.embed_scale, dtype=x.dtype, device=x.device)
        if self.noise and self.training and torch.is_grad_enabled():
            x = with_noise(x, self.noise, ctx)
        x = self.after_embed(x, ctx)
        if self.positions is not None:
            if ctx.reach() > self.config.max_positions:
                what = f"{ctx.reach()} tokens are more than the {self.config.max_positions} positions of this model"
                raise ModelError(what, hint="give it shorter texts")
            x = x + self.positions(ctx.pos).to(x.dtype)
        mode = self.recompute if torch.is_grad_enabled() else "none"
        ctx.recompute, ctx.shared = mode in ("block", "offload"), {}
        inputs = None if self.layer_inputs is None else self.layer_inputs(ids, x, ctx)
        contexts = [ctx, *(copy(ctx) for _ in self.kinds[1:])]
        for one, kind in zip(contexts, self.kinds, strict=True):
            self.complete(one, kind, x)
        with Offloaded(x) if mode == "offload" else nullcontext():
            for layer, (block, number) in enumerate(zip(self.blocks, self.kind_of, strict=True)):
                ctx = contexts[number]
                if inputs is not None:  # a context of its own: checkpointing reads it again
                    ctx = replace(ctx, layer_input=inputs[:, :, layer])
                x = self.run(block, x, ctx, mode)
        x = self.norm(x if at is None else x.flatten(0, 1)[at])
        if headless:
            return x
        if targets is None:
            return self.logits(x)
        given, scale, cap = None if weights is None else weights(), self.config.logit_scale, self.config.logit_cap
        return summed_cross_entropy(self.head, x, targets, scale, cap, given, objective)

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits (..., V) of what the last block and norm gave (..., d)."""
        return finished(self.head(x), self.config.logit_scale, self.config.logit_cap)

    def run(self, block: Block, x: Tensor, ctx: Context, mode: Checkpointing) -> Tensor:
        """Returns a block's output for x (B, T, d)."""
        fused = self.fused(block, x, ctx) if self.fused is not None and torch.is_grad_enabled() else None
        if fused is not None:
            return fused
        # only an x with a gradient: evaluation, and the first block above a frozen embedding, would compile anew
        step = self.compiled if self.compiled is not None and x.requires_grad else run_block
        if ctx.recompute:
            return checkpoint(step, block, x, ctx, use_reentrant=False)
        with Recomputed() if mode == "cheap" and step is run_block else nullcontext():  # the compiler has its own way
            return step(block, x, ctx)

    def complete(self, ctx: Context, kind: Layer, x: Tensor) -> None:
        """Sets what a context has for layers of one kind: rotary positions, the mask of a step with a cache, chunks."""
        if kind.chunked is not None:
            ctx.cut(kind.chunked.width)
        if not kind.attends:
            return
        size = self.config.rotary_of(kind)
        if size and kind.rope is not None:
            pos = ctx.pos.masked_fill(ctx.pos < self.learned_keys, 0) if self.learned_keys else ctx.pos
            frequencies = self.rope(token_frequencies(size, kind.rope, ctx, x.device))
            angle = pos[:, None, :, None].float() * frequencies
            cos, sin = angle.cos(), angle.sin()
            if kind.rope.scaling is not None and kind.rope.scaling.attention_factor != 1:
                cos, sin = cos * kind.rope.scaling.attention_factor, sin * kind.rope.scaling.attention_factor
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            ctx.rope = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        if (growth := self.config.query_growth) is not None:
            pos = ctx.pos[:, None, :, None]
            ctx.query_growth = (1 + growth.rate * torch.log(1 + torch.floor(pos / growth.length))).to(x.dtype)
        if ctx.cache is not None:
            ctx.look_back(ctx.pos.size(1), kind.window, x.dtype)
