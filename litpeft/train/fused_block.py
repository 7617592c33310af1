"""A LLaMA block in training on a GPU, forward and backward, with few passes over memory beside its matrix products.

It computes what `Block.forward` does, for blocks whose linear layers are frozen, with low-rank updates or none;
`groups_of` refuses every other block. For the backward pass it keeps the block's input, queries, keys, values, the
output of attention, the sum after it, gate and up; norms and SwiGLU are computed again where they are read.
Letters: N tokens, d model width, F width of the MLP, r rank, R sum of the ranks of layers that read the same input.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.utils.checkpoint import checkpoint

from litpeft.model.context import Context
from litpeft.model.gpt import GPT, Block
from litpeft.model.kernels import gpu_kernels
from litpeft.model.known_block import READ, at_defaults, is_llama
from litpeft.model.norms import RMSNorm
from litpeft.train.group import Group, cast_together, parts_of

TOGETHER = 4  # blocks whose factors are cast at once
SWITCHES = READ | {"qkv_bias"}  # of the model, that are heeded here
HALF = (torch.bfloat16, torch.float16)


Groups = tuple[Group, Group, Group, Group]  # q, k, v; o; gate, up; down


@cache
def kernels() -> ModuleType | None:
    """Returns triton_block.py, or None where Triton cannot be used."""
    if gpu_kernels() is None:
        return None
    from litpeft.model.kernels import triton_block as block_kernels

    return block_kernels


class FusedStep:
    """What computes the blocks of a model on a GPU, if they are known."""

    def __init__(self, model: GPT):
        self.blocks = list(model.blocks)

    def __call__(self, block: Block, x: Tensor, ctx: Context) -> Tensor | None:
        """Returns what the block makes of x (1, N, d), or None where `Block.forward` has to do it."""
        fits = x.is_cuda and x.dtype in HALF and handles(block, x, ctx) and kernels() is not None
        groups = self.groups(block, x.dtype, ctx.shared) if fits else None
        return None if groups is None else run(block, x, ctx, groups)

    def groups(self, block: Block, dtype: torch.dtype, shared: dict) -> Groups | None:
        """Returns the groups of a block, made with those of the next blocks, so that their factors are cast at once.

        Not of all blocks: the GPU would wait for the first.
        """
        made: dict[Block, Groups | None] = shared.setdefault(FusedStep, {})
        if block not in made:
            first = self.blocks.index(block)
            found = {one: groups_of(one) for one in self.blocks[first : first + TOGETHER]}
            cast_together([group for groups in found.values() for group in groups or ()], dtype)
            made.update(found)
        return made[block]


def use_fused_step(model: GPT, device: torch.device) -> None:
    """Has a model train by a FusedStep where it lies on a GPU and has no switch that this file does not name."""
    if device.type != "cuda" or not at_defaults(model.config, SWITCHES):
        return
    model.fused = FusedStep(model)
    lay_together(model)


def lay_together(model: GPT) -> None:
    """Moves weights that are multiplied with the same x, one after the other in memory; their layers hold views."""
    for block in model.blocks:
        for group in groups_of(block) or ():
            group.lay_together()
        if model.embed.weight.is_cuda:
            torch.cuda.empty_cache()  # each of the former weights has left a hole of its size


def handles(block: Block, x: Tensor, ctx: Context) -> bool:
    """Returns whether x is one packed row of which all heads rotate whole."""
    packed = type(x) is Tensor and len(x) == 1 and ctx.documents is not None and ctx.cache is None and ctx.mask is None
    return packed and ctx.rope is not None and ctx.rope[0].size(-1) == block.attn.head_dim


def groups_of(block: Block) -> Groups | None:
    """Returns the block's linear layers if all that it does is done here, else None: what is not named is refused."""
    attn, mlp = block.attn, block.mlp
    if not is_llama(block) or block.norm1.weight.requires_grad or block.norm2.weight.requires_grad:
        return None
    if any(layer.bias is not None for layer in (attn.o, mlp.gate, mlp.up, mlp.down)):
        return None
    groups = Group.of(attn.q, attn.k, attn.v), Group.of(attn.o), Group.of(mlp.gate, mlp.up), Group.of(mlp.down)
    return None if None in groups else groups


def run(block: Block, x: Tensor, ctx: Context, groups: Groups) -> Tensor:
    """Returns what a block with these groups makes of x."""
    qkv, o, gate_up, down = groups
    if ctx.recompute:
        options = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random is drawn
        x = checkpoint(_attention, block, x, ctx, qkv, o, **options)
    else:
        x = _attention(block, x, ctx, qkv, o)
    given = (block.norm2, gate_up, down, ctx.recompute, *gate_up.factors, *down.factors)
    return _MLP.apply(x.view(-1, x.size(-1)), *given).view(x.shape)


def _attention(block: Block, x: Tensor, ctx: Context, qkv: Group, o: Group) -> Tensor:
    """Returns x + what attention adds to it."""
    attn, tokens = block.attn, x.size(1)
    q, k, v, rows = _Input.apply(x.view(tokens, -1), block.norm1, qkv, ctx.rope, *qkv.factors)
    q, k, v = (y.view(1, tokens, -1, attn.head_dim).transpose(1, 2) for y in (q, k, v))
    y = attn.core(q, k, v, ctx, attn).transpose(1, 2).reshape(tokens, -1)
    return _Output.apply(y, rows, o, *o.factors).view(x.shape)


def _sum(x: Tensor, t: Tensor, b: Tensor, y: Tensor, group: Group) -> Tensor:
    """Returns x + t b^T + W y (N, out) of a group of one layer."""
    product = group.own_product(y)
    if product is not None:
        return kernels().updated(x, t, b, product) if b.size(1) else product.add_(x)
    weight = group.weight(x.dtype).T
    return kernels().updated(x, t, b).addmm_(y, weight) if b.size(1) else torch.addmm(x, y, weight)


def _normed(dt: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Returns dt^T h (R, d) of dt (N, R) and the normed h = scale x weight (N, d), without making h."""
    return ((dt * scale[:, None]).to(x.dtype).T @ x) * weight.to(x.dtype)


def _types(factors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if factor is None else factor.dtype for factor in factors]


class _Input(torch.autograd.Function):
    """q, k and v of x (N, d): normed, updated, rotated. Returns x too, for the sum after attention."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: RMSNorm, group: Group, rope: tuple[Tensor, Tensor], *factors: Tensor | None):
        a, bs = group.cast(x.dtype, factors)
        h, scale = kernels().rms_norm(x, norm.weight, norm.eps)
        t = h @ a.T
        q, k, v = group.product(h).split(group.sizes, 1)
        of_q, of_k, (tv, bv) = parts_of(t, bs)
        kernels().rotate(q, of_q, *rope)
        kernels().rotate(k, of_k, *rope)
        if bv.size(1):
            v.addmm_(tv, bv.T)
        ctx.norm, ctx.group, ctx.types = norm, group, _types(factors)
        ctx.save_for_backward(x, scale, t, a, *rope, *bs)
        return q, k, v, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor, dx: Tensor):
        x, scale, t, a, cos, sin, *bs = ctx.saved_tensors
        dy = x.new_empty(len(x), sum(ctx.group.sizes))
        to_q, to_k, to_v = dy.split(ctx.group.sizes, 1)
        kernels().rotate_back(dq, cos, sin, to_q)
        kernels().rotate_back(dk, cos, sin, to_k)
        to_v.copy_(dv)
        dt, dbs = ctx.group.thin(dy, parts_of(t, bs))
        gradients = ctx.group.gradients(_normed(dt, x, scale, ctx.norm.weight), dbs, ctx.types)
        if ctx.needs_input_grad[0]:
            dh = ctx.group.spread(dt, a, dy)
            dx = kernels().rms_norm_backward(dh, x, ctx.norm.weight, scale, dx)
        return dx, None, None, None, *gradients


class _Output(torch.autograd.Function):
    """x + W y, updated: what attention adds to the residual stream. x is (N, d), y (N, in)."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, group: Group, *factors: Tensor | None) -> Tensor:
        a, (b,) = group.cast(x.dtype, factors)
        t = y @ a.T
        ctx.group, ctx.types = group, _types(factors)
        ctx.save_for_backward(y, t, a, b)
        return _sum(x, t, b, y, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        y, t, a, b = ctx.saved_tensors
        dt, dbs = ctx.group.thin(dy, [(t, b)])
        gradients = ctx.group.gradients(dt.T @ y, dbs, ctx.types)
        return ctx.group.spread(dt, a, dy), dy, None, *gradients


class _MLP(torch.autograd.Function):
    """x + down(silu(gate(h)) * up(h)) with h = norm(x), updated. With `recompute` it keeps x only, of what is large."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: RMSNorm, group: Group, below: Group, recompute: bool, *factors: Tensor | None):
        count = len(group.factors)
        a, bs = group.cast(x.dtype, factors[:count])
        ad, (bd,) = below.cast(x.dtype, factors[count:])
        both, t, scale = _MLP.middle(x, norm, group, a)
        y = kernels().swiglu(*both.chunk(2, 1), parts_of(t, bs))
        td = y @ ad.T
        ctx.norm, ctx.group, ctx.below = norm, group, below
        ctx.types = _types(factors[:count]), _types(factors[count:])
        ctx.save_for_backward(x, td, a, *bs, ad, bd, *(() if recompute else (both, t, scale)))
        return _sum(x, td, bd, y, below)

    @staticmethod
    def middle(x: Tensor, norm: RMSNorm, group: Group, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns gate and up (N, 2 F) without their updates, t (N, R) of these, and the scale (N,) of the norm."""
        h, scale = kernels().rms_norm(x, norm.weight, norm.eps)
        return group.product(h), h @ a.T, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, td, a, bg, bu, ad, bd, *kept = ctx.saved_tensors
        both, t, scale = kept or _MLP.middle(x, ctx.norm, ctx.group, a)
        parts = parts_of(t, (bg, bu))
        dtd, dbd = ctx.below.thin(dy, [(td, bd)])
        y = ctx.below.product_back(dy)
        kernels().swiglu_backward(y, *both.chunk(2, 1), parts, (dtd, ad))  # which writes over its first three
        increment_version(both)  # so that a second backward pass fails
        of_down = ctx.below.gradients(dtd.T @ y, dbd, ctx.types[1])
        del y
        dt, dbs = ctx.group.thin(both, parts)
        of_gate_up = ctx.group.gradients(_normed(dt, x, scale, ctx.norm.weight), dbs, ctx.types[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dh = ctx.group.spread(dt, a, both)
            dx = kernels().rms_norm_backward(dh, x, ctx.norm.weight, scale, dy)
        return dx, None, None, None, None, *of_gate_up, *of_down
