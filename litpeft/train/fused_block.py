"""A LLaMA block in training on a GPU, forward and backward, with few passes over memory beside its matrix products.

It computes what `Block.forward` does, for blocks whose linear layers are frozen, with low-rank updates or none;
`groups_of` refuses every other block. For the backward pass it keeps the block's input, queries, keys, values, the
output of attention, the sum after it, gate and up; norms and SwiGLU are computed again where they are read.
Letters: N tokens, d model width, F width of the MLP, r rank, R sum of the ranks of layers that read the same input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version
from torch.utils.checkpoint import checkpoint

from litpeft.model.context import Context
from litpeft.model.gpt import GPT, Block
from litpeft.model.kernels import gpu_kernels
from litpeft.model.known_block import READ, at_defaults, is_llama
from litpeft.model.norms import RMSNorm
from litpeft.model.slots import Linear, is_empty

THICK = 64  # rank above which an update is better two products of its own
SWITCHES = READ | {"qkv_bias"}  # of the model, that are heeded here
HALF = (torch.bfloat16, torch.float16)


@dataclass
class Group:
    """Layers that read the same x, and the factors A (r, in) and B (out, r) of their updates: all A, then all B."""

    layers: Sequence[Linear]
    factors: list[Tensor | None]

    @classmethod
    def of(cls, *layers: Linear) -> "Group | None":
        """Returns the group, or None if a layer trains, or its slot does something else than a low-rank update."""
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        for layer in layers:
            pair = (None, None) if is_empty(layer.slot) else layer.slot.factors()
            trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
            if trains or pair is None or (pair[0] is not None and len(pair[0]) > THICK):
                return None
            pairs.append(pair)
        return cls(layers, [a for a, _ in pairs] + [b for _, b in pairs])

    def cast(self, factors: Sequence[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """Returns A of all layers (R, in) and B (out, r) of each, in the type of the products; r is 0 for no update."""
        as_, bs = factors[: len(self.layers)], factors[len(self.layers) :]
        first, device = self.layers[0], self.layers[0].weight.device
        given = [a for a in as_ if a is not None]
        given = given or [torch.empty(0, first.in_features, dtype=dtype, device=device)]
        a = _joined(given, 0).to(dtype)
        sizes = [layer.out_features for layer in self.layers]
        empty = (torch.empty(size, 0, dtype=dtype, device=device) for size in sizes)
        return a, [e if b is None else b.to(dtype) for b, e in zip(bs, empty, strict=True)]

    def gradients(self, da: Tensor, dbs: Sequence[Tensor], types: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """Returns the gradients in the order of the factors and in their types; None where there is no update."""
        das = da.split([db.size(1) for db in dbs])
        return [None if t is None else d.to(t) for d, t in zip([*das, *dbs], types, strict=True)]


Groups = tuple[Group, Group, Group, Group]  # q, k, v; o; gate, up; down


@cache
def kernels() -> ModuleType | None:
    """Returns triton_block.py, or None where Triton cannot be used."""
    if gpu_kernels() is None:
        return None
    from litpeft.model.kernels import triton_block as block_kernels

    return block_kernels


def fused_step(block: Block, x: Tensor, ctx: Context) -> Tensor | None:
    """Returns what the block makes of x (1, N, d), or None where `Block.forward` has to do it."""
    fits = x.is_cuda and x.dtype in HALF and handles(block, x, ctx) and kernels() is not None
    groups = groups_of(block) if fits else None
    return None if groups is None else run(block, x, ctx, groups)


def use_fused_step(model: GPT, device: torch.device) -> None:
    """Has a model train by `fused_step` where it lies on a GPU and has no switch that this file does not name."""
    if device.type == "cuda" and at_defaults(model.config, SWITCHES):
        model.fused = fused_step


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


def _linear(layer: Linear, x: Tensor) -> Tensor:
    """Returns W x + b (N, out)."""
    bias, y = None if layer.bias is None else layer.bias.to(x.dtype), layer.multiply(x)
    if y is None:
        return F.linear(x, layer.dense().to(x.dtype), bias)
    return y if bias is None else y.add_(bias)


def _sum(x: Tensor, t: Tensor, b: Tensor, y: Tensor, layer: Linear) -> Tensor:
    """Returns x + t b^T + W y (N, out)."""
    updated, product = kernels().updated(x, t, b) if b.size(1) else None, layer.multiply(y)
    if product is not None:
        return product.add_(x if updated is None else updated)
    weight = layer.dense().to(x.dtype).T
    return torch.addmm(x, y, weight) if updated is None else updated.addmm_(y, weight)


def _add_back(dx: Tensor | None, dy: Tensor, layer: Linear) -> Tensor:
    """Returns dx + W^T dy (N, in), written over dx; without dx, W^T dy."""
    product = layer.multiply(dy, back=True)
    if product is not None:
        return product if dx is None else dx.add_(product)
    weight = layer.dense().to(dy.dtype)
    return dy @ weight if dx is None else dx.addmm_(dy, weight)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _parts(t: Tensor, bs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns for each layer its columns of t (N, R), beside its B."""
    return list(zip(t.split([b.size(1) for b in bs], 1), bs, strict=True))


def _thin(dys: Sequence[Tensor], parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradients of t (N, R) and of each B, of the updates t b^T."""
    dt = _joined([dy @ b for dy, (_, b) in zip(dys, parts, strict=True)], 1)
    return dt, [dy.T @ t for dy, (t, _) in zip(dys, parts, strict=True)]


def _spread(dt: Tensor, a: Tensor, dys: Sequence[Tensor], layers: Sequence[Linear]) -> Tensor:
    """Returns the gradient (N, in) of what the layers read. Each product adds to the one before as it is written."""
    dx = dt @ a if len(a) else None
    for dy, layer in zip(dys, layers, strict=True):
        dx = _add_back(dx, dy, layer)
    return dx


def _normed(dt: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """Returns dt^T h (R, d) of dt (N, R) and the normed h = scale x weight (N, d), without making h."""
    return ((dt * scale[:, None]).to(x.dtype).T @ x) * weight.to(x.dtype)


def _types(factors: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    return [None if factor is None else factor.dtype for factor in factors]


class _Input(torch.autograd.Function):
    """q, k and v of x (N, d): normed, updated, rotated. Returns x too, for the sum after attention."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: RMSNorm, group: Group, rope: tuple[Tensor, Tensor], *factors: Tensor | None):
        a, bs = group.cast(factors, x.dtype)
        h, scale = kernels().rms_norm(x, norm.weight, norm.eps)
        t = h @ a.T
        q, k, v = (_linear(layer, h) for layer in group.layers)
        of_q, of_k, (tv, bv) = _parts(t, bs)
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
        dys = [kernels().rotated_back(dq, cos, sin), kernels().rotated_back(dk, cos, sin), dv]
        dt, dbs = _thin(dys, _parts(t, bs))
        gradients = ctx.group.gradients(_normed(dt, x, scale, ctx.norm.weight), dbs, ctx.types)
        if ctx.needs_input_grad[0]:
            dh = _spread(dt, a, dys, ctx.group.layers)
            dx = kernels().rms_norm_backward(dh, x, ctx.norm.weight, scale, dx)
        return dx, None, None, None, *gradients


class _Output(torch.autograd.Function):
    """x + W y, updated: what attention adds to the residual stream. x is (N, d), y (N, in)."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor, group: Group, *factors: Tensor | None) -> Tensor:
        a, (b,) = group.cast(factors, x.dtype)
        t = y @ a.T
        ctx.group, ctx.types = group, _types(factors)
        ctx.save_for_backward(y, t, a, b)
        return _sum(x, t, b, y, group.layers[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        y, t, a, b = ctx.saved_tensors
        dt, dbs = _thin([dy], [(t, b)])
        gradients = ctx.group.gradients(dt.T @ y, dbs, ctx.types)
        return _spread(dt, a, [dy], ctx.group.layers), dy, None, *gradients


class _MLP(torch.autograd.Function):
    """x + down(silu(gate(h)) * up(h)) with h = norm(x), updated. With `recompute` it keeps x only, of what is large."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: RMSNorm, group: Group, below: Group, recompute: bool, *factors: Tensor | None):
        count = len(group.factors)
        a, bs = group.cast(factors[:count], x.dtype)
        ad, (bd,) = below.cast(factors[count:], x.dtype)
        gate, up, t, scale = _MLP.middle(x, norm, group, a)
        y = kernels().swiglu(gate, up, _parts(t, bs))
        td = y @ ad.T
        ctx.norm, ctx.group, ctx.below = norm, group, below
        ctx.types = _types(factors[:count]), _types(factors[count:])
        ctx.save_for_backward(x, td, a, *bs, ad, bd, *(() if recompute else (gate, up, t, scale)))
        return _sum(x, td, bd, y, below.layers[0])

    @staticmethod
    def middle(x: Tensor, norm: RMSNorm, group: Group, a: Tensor) -> tuple[Tensor, ...]:
        """Returns gate and up (N, F) without their updates, t (N, R) of these, and the scale (N,) of the norm."""
        h, scale = kernels().rms_norm(x, norm.weight, norm.eps)
        gate, up = (_linear(layer, h) for layer in group.layers)
        return gate, up, h @ a.T, scale

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, td, a, bg, bu, ad, bd, *kept = ctx.saved_tensors
        gate, up, t, scale = kept or _MLP.middle(x, ctx.norm, ctx.group, a)
        parts = _parts(t, (bg, bu))
        dtd, dbd = _thin([dy], [(td, bd)])
        y = _add_back(None, dy, ctx.below.layers[0])
        kernels().swiglu_backward(y, gate, up, parts, (dtd, ad.T.contiguous()))  # which writes over its first three
        for tensor in kept[:2]:
            increment_version(tensor)  # so that a second backward pass fails
        of_down = ctx.below.gradients(dtd.T @ y, dbd, ctx.types[1])
        del y
        dt, dbs = _thin([gate, up], parts)
        of_gate_up = ctx.group.gradients(_normed(dt, x, scale, ctx.norm.weight), dbs, ctx.types[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dh = _spread(dt, a, [gate, up], ctx.group.layers)
            dx = kernels().rms_norm_backward(dh, x, ctx.norm.weight, scale, dy)
        return dx, None, None, None, None, *of_gate_up, *of_down
