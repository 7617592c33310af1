"""Linear attention: each head has one matrix, which a token reads in place of all earlier keys and values.

    q, k, v = silu(conv(in_q x)), silu(conv(in_k x)), silu(conv(in_v x))
    q, k = q / |q| / sqrt(K), k / |k|
    b = sigmoid(in_b x)
    g = exp(-exp(A_log) softplus(in_a x + dt_bias))
    y = out(norm(gated_delta_rule(q, k, v, g, b)) * silu(in_z x))

`conv` sums each channel over the last W tokens, with weights. Gated DeltaNet https://arxiv.org/abs/2412.06464.

Letters: B rows, T new tokens of each, N tokens of all rows, M chunks, C tokens of a chunk.
H heads of values, K size of a key, V size of a value, F channels of q, k and v together.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.context import Context
from litpeft.model.delta_rule import Chunks, Group, gated_delta_rule
from litpeft.model.parts import LinearAttention
from litpeft.model.short_convolution import Convolution
from litpeft.model.slots import Linear, project

LENGTH_EPS = 1e-6  # of queries and keys, whatever the model's


class GatedNorm(nn.Module):
    """x / rms(x) * weight * silu(z), over the values of each head."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps


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


class Core(nn.Module):
    """What a layer makes of its projections, without parameters of its own."""

    def forward(self, qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, ctx: Context, attn: GatedDeltaNet) -> Tensor:
        """qkv (B, T, F), z (B, T, H * V), a and b (B, T, H) -> (B, T, H * V)"""
        weights = attn.conv.weight, attn.A_log, attn.dt_bias, attn.norm.weight
        if ctx.cache is not None:
            cache = ctx.cache[attn.layer]
            before, memory = cache.earlier(ctx)
            qkv = torch.cat((before, qkv.to(before.dtype)), 1)
            tokens = [x.flatten(0, 1) for x in (qkv, z, b, a)]
            y, memory = read(tokens, weights, ctx.chunks, memory, attn.sizes, attn.norm.eps)
            cache.remember(qkv, memory, ctx)
        else:
            tokens = [x.flatten(0, 1) for x in (qkv, z, b, a)]
            y = _Read.apply(ctx.chunks, attn.sizes, attn.norm.eps, *tokens, *weights)
        return y.view_as(z)


Tensors = tuple[Tensor, ...] | list[Tensor]


def read(
    tokens: Tensors,
    weights: Tensors,
    chunks: Chunks,
    memory: Tensor,
    sizes: LinearAttention,
    eps: float,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns y (N, H * V) and each document's S after its tokens, for S before them (documents, H, K, V).

    `tokens` are qkv (N, F), z (N, H * V), b and a (N, H); qkv may have more rows, as `chunks` say. `weights` are those
    of the convolution (F, 1, W), A_log and dt_bias (H,) and the norm's (V,). S before each group is put into `kept`.
    """
    y, memory, ended = torch.zeros_like(tokens[1]), memory[chunks.order], []  # zeros at what is padding
    for group in chunks.groups:
        ended.append(memory[group.counts[0] :])  # of documents without a chunk more
        memory = memory[: group.counts[0]]
        if kept is not None:
            kept.append(memory)
        part, memory = piece(gathered(tokens, group), weights, group, memory, sizes, eps)
        group.write(y, part)
    return y, torch.cat([memory, *reversed(ended)])[chunks.order.argsort()]


def gathered(tokens: Tensors, group: Group) -> list[Tensor]:
    """Returns qkv (M, W - 1 + C, F), z (M, C, H * V), b and a (M, C, H) of a group."""
    return [tokens[0][group.window], *(x[group.token] for x in tokens[1:])]


def piece(
    tokens: Tensors, weights: Tensors, group: Group, memory: Tensor, sizes: LinearAttention, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns y (M, C, H * V) of a group, and S of its documents after it."""
    with torch.autocast(memory.device.type, enabled=False):
        (qkv, z, b, a), (conv, A_log, dt_bias, norm), wide = tokens, weights, memory.dtype
        keys, per_key = sizes.key_heads * sizes.key_size, sizes.heads // sizes.key_heads
        qkv, conv = qkv.to(wide).where(group.seen[..., None], 0), conv[:, 0].to(wide)
        convolved = qkv[:, : z.size(1)] * conv[:, 0]
        for at in range(1, sizes.width):
            convolved = torch.addcmul(convolved, qkv[:, at : at + z.size(1)], conv[:, at])
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


class _Read(torch.autograd.Function):
    """`read` of texts from their start. It keeps its inputs and S before each group, and computes groups again."""

    @staticmethod
    def forward(ctx, chunks: Chunks, sizes: LinearAttention, eps: float, *inputs: Tensor) -> Tensor:
        z, kept, matrix = inputs[1], [], (sizes.heads, sizes.key_size, sizes.value_size)
        wide = torch.promote_types(z.dtype, torch.float32)
        memory = torch.zeros(len(chunks.order), *matrix, dtype=wide, device=z.device)
        y, _ = read(inputs[:4], inputs[4:], chunks, memory, sizes, eps, kept)
        ctx.save_for_backward(*inputs, *kept)
        ctx.read = chunks.groups, sizes, eps
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        groups, sizes, eps = ctx.read
        saved = ctx.saved_tensors
        inputs, kept = saved[:8], saved[8:]
        needed = ctx.needs_input_grad[3:]
        grads = [torch.zeros_like(x) if need else None for x, need in zip(inputs, needed, strict=True)]
        dmemory = torch.zeros_like(kept[-1])
        for group, memory in zip(reversed(groups), reversed(kept), strict=True):
            given = [*gathered(inputs[:4], group), *inputs[4:]]
            given = [x.detach().requires_grad_(need) for x, need in zip(given, needed, strict=True)]
            memory = memory.detach().requires_grad_(group is not groups[0])
            with torch.enable_grad():
                ends = piece(given[:4], given[4:], group, memory, sizes, eps)
            dmemory = torch.cat((dmemory, dmemory.new_zeros(len(memory) - len(dmemory), *dmemory.shape[1:])))
            into = [x for x in (*given, memory) if x.requires_grad]
            back = [dy[group.token].where(group.real[..., None], 0), dmemory]
            if not ends[1].requires_grad:  # where only z or the norm trains
                ends, back = ends[:1], back[:1]
            found = iter(torch.autograd.grad(ends, into, back))
            parts = [next(found) if need else None for need in needed]
            dmemory = next(found, dmemory)
            for at, (grad, part) in enumerate(zip(grads, parts, strict=True)):
                if part is None:
                    continue
                if at == 0:
                    grad.index_add_(0, group.window.flatten(), part.flatten(0, 1))
                elif at < 4:
                    group.write(grad, part)
                else:
                    grad += part
        return None, None, None, *grads
