"""A LLaMA block for a few new tokens with a KV cache, as Triton kernels for GPUs: five for one token, seven for more.

Reading the weights takes nearly all of the time, so every product reads its weight once, and biases, rotation, SwiGLU
and residuals are computed where a product writes its output. One token is normed where a product reads it; of more,
every program would norm all of them again, so they have a kernel of their own. A long cache takes one more kernel.
Sums are in float32 and in an order that does not change.
Letters: N new tokens of all rows, d model width, F width of the MLP, H query heads, G key/value heads, D head size,
S length of the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litpeft.model.kernels.triton_block import rms_norm
from litpeft.model.kernels.triton_decode_attention import attended as attended
from litpeft.model.kernels.triton_decode_codes import Tables
from litpeft.model.kernels.triton_decode_products import Plan, Weight, product

TOKENS = 16  # new tokens, at most: the rows of a tensor core's product


class Tile(NamedTuple):
    """What a program of a product reads at a time, and how."""

    outputs: int  # of the weight's rows; of pairs of rows, where a kernel combines two
    inputs: int
    warps: int
    stages: int  # loads that are under way at once


# of each product for one token, by sums, and for more, by tensor cores
TILES = {
    "qkv": (Tile(4, 512, 2, 1), Tile(8, 256, 2, 5)),
    "gate_up": (Tile(2, 1024, 4, 3), Tile(8, 256, 2, 5)),
    "o": (Tile(4, 1024, 4, 1), Tile(16, 256, 2, 5)),
    "down": (Tile(8, 1024, 4, 1), Tile(16, 256, 2, 5)),
}
# the same for weights in codes of four bits, of which a thread takes 32 at a time
CODED_TILES = {
    "qkv": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "gate_up": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "o": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "down": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
}


@triton.jit
def _one_of(q, k, v, is_q, turns):
    """Returns the pointer for queries, keys or values."""
    return tl.where(is_q, q, tl.where(turns, k, v))


@triton.jit(do_not_specialize=["rows"])
def _qkv(
    x, norm, eps, wq, wk, wv, tables, biases, rope, pos, q, k, v, rows, tokens, d, heads, kv_heads, length,
    D: tl.constexpr, plan: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = plan.outputs
    R: tl.constexpr = plan.tokens
    head, half = tl.program_id(1), D // 2
    turns, is_q = head < heads + kv_heads, head < heads
    absmax, scale, offset = None, None, None
    if wq.absmax is not None:
        absmax = _one_of(wq.absmax, wk.absmax, wv.absmax, is_q, turns)
    if wq.scale is not None:
        scale = _one_of(wq.scale, wk.scale, wv.scale, is_q, turns)
        offset = _one_of(wq.offset, wk.offset, wv.offset, is_q, turns)
    weight, out = Weight(_one_of(wq.w, wk.w, wv.w, is_q, turns), absmax, scale, offset), _one_of(q, k, v, is_q, turns)
    head = tl.where(is_q, head, tl.where(turns, head - heads, head - heads - kv_heads))
    # dimensions i and i + D / 2 rotate together
    both = tl.arange(0, 2 * N)
    i = tl.minimum(tl.program_id(0) * N + both // 2, half - 1)
    row = (head * D + i + both % 2 * half).to(tl.int64)
    y = product(x, norm, eps, weight, row, tables, rows, d, plan, q.dtype.element_ty)
    first, second = tl.split(tl.reshape(y, (R, N, 2)))
    token, i = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    fits, at = (token < rows) & (i < half), token * D + half + i
    if biases[0] is not None:
        b = _one_of(biases[0], biases[1], biases[2], is_q, turns)
        first += tl.load(b + head * D + i, mask=i < half, other=0.0).to(tl.float32)
        second += tl.load(b + head * D + half + i, mask=i < half, other=0.0).to(tl.float32)
    c = tl.where(turns, tl.load(rope[0] + at, mask=fits, other=0.0).to(tl.float32), 1.0)
    s = tl.where(turns, tl.load(rope[1] + at, mask=fits, other=0.0).to(tl.float32), 0.0)
    here = tl.load(pos + token, mask=token < rows, other=0)
    cached = ((token // tokens).to(tl.int64) * kv_heads + head) * length + here
    out += tl.where(is_q, token * heads + head, cached) * D + i
    tl.store(out, (first * c - second * s).to(q.dtype.element_ty), mask=fits)
    tl.store(out + half, (second * c + first * s).to(q.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["rows"])
def _gate_up(x, norm, eps, gate, up, tables, out, rows, d, width, plan: tl.constexpr):
    N: tl.constexpr = plan.outputs
    R: tl.constexpr = plan.tokens
    both = tl.arange(0, 2 * N)
    row, is_gate = tl.minimum(tl.program_id(0) * N + both // 2, width - 1).to(tl.int64), both % 2 == 0
    w, absmax, scale, offset = tl.where(is_gate, gate.w, up.w), None, None, None
    if gate.absmax is not None:
        w, absmax = w[:, None], tl.where(is_gate, gate.absmax, up.absmax)[:, None]
    if gate.scale is not None:
        scale = tl.where(is_gate, gate.scale, up.scale)[:, None]
        offset = tl.where(is_gate, gate.offset, up.offset)[:, None]
    weight = Weight(w, absmax, scale, offset)
    y = product(x, norm, eps, weight, row, tables, rows, d, plan, out.dtype.element_ty)
    g, u = tl.split(tl.reshape(y, (R, N, 2)))
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    y = (g * u / (1 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + token * width + column, y, mask=(token < rows) & (column < width))


@triton.jit(do_not_specialize=["rows"])
def _add(x, residual, weight, tables, out, rows, d, width, plan: tl.constexpr):
    N: tl.constexpr = plan.outputs
    R: tl.constexpr = plan.tokens
    row = tl.minimum(tl.program_id(0) * N + tl.arange(0, N), width - 1).to(tl.int64)
    y = product(x, None, None, weight, row, tables, rows, d, plan, out.dtype.element_ty)
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    at, fits = token * width + column, (token < rows) & (column < width)
    y += tl.load(residual + at, mask=fits, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=fits)


def _plan(name: str, rows: int, d: int, weight: Weight) -> tuple[Plan, int]:
    """Returns how a product is computed, and by how many warps."""
    tile = (TILES if weight.absmax is None else CODED_TILES)[name][rows > 1]
    tokens, even = 1 if rows == 1 else TOKENS, d % tile.inputs == 0
    return Plan(tokens, tile.outputs, tile.inputs, tile.stages, even), tile.warps


def _normed(x: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """Returns x (..., d) as (N, d), and the norm that a product is to do: one token's; more are normed here."""
    x = x.flatten(0, -2)
    return (x, norm) if len(x) == 1 else (rms_norm(x, norm, eps)[0], None)


def _read(x: Tensor | None, weight: Weight, rows: int) -> Tensor | None:
    """Returns x as a product with the weight reads it: one token's two numbers at once, if the weight is in codes."""
    pairs = x is not None and weight.absmax is not None and rows == 1
    return x.view(torch.int32 if x.itemsize == 2 else torch.int64) if pairs else x


def _held(weight: Weight, rows: int) -> Weight:
    """Returns a weight as a product reads it: codes for one token four bytes at once."""
    return weight._replace(w=weight.w.view(torch.int32)) if weight.absmax is not None and rows == 1 else weight


def queries(
    x: Tensor,
    norm: Tensor,
    eps: float,
    heads: int,
    weights: tuple[Weight, Weight, Weight],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    pos: Tensor,
    cache: tuple[Tensor, Tensor],
    tables: Tables | None = None,
) -> Tensor:
    """Returns the rotated queries (N, H, D) of x (B, T, d); writes keys and values into the cache (B, G, S, D) each.

    Weights are (out, d), `heads` is H, cos and sin are those of ops.rotate, (B, 1, T, D), and pos (B, T) is int64.
    """
    (count, tokens, d), (k, v) = x.shape, cache
    rows, (kv_heads, length, size) = count * tokens, k.shape[1:]
    q, (plan, warps) = x.new_empty(rows, heads, size), _plan("qkv", rows, d, weights[0])
    x, norm = _normed(x, norm, eps)
    x, norm = _read(x, weights[0], rows), _read(norm, weights[0], rows)
    held = [_held(weight, rows) for weight in weights]
    sizes = rows, tokens, d, heads, kv_heads, length, size
    grid = triton.cdiv(size // 2, plan.outputs), heads + 2 * kv_heads
    _qkv[grid](x, norm, eps, *held, tables, biases, rope, pos, q, k, v, *sizes, plan, num_warps=warps)
    return q


def added(x: Tensor, y: Tensor, weight: Weight, name: str, tables: Tables | None = None) -> Tensor:
    """Returns x + W y of x (..., width), y (N, d) and a weight (width, d); `name` says which product it is."""
    (rows, d), width, out = y.shape, x.size(-1), torch.empty_like(x)
    plan, warps = _plan(name, rows, d, weight)
    given = _read(y, weight, rows), x, _held(weight, rows), tables, out
    _add[triton.cdiv(width, plan.outputs),](*given, rows, d, width, plan, num_warps=warps)
    return out


def swiglu(
    x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight, width: int, tables: Tables | None = None
) -> Tensor:
    """Returns silu(W x) * (V x) (N, width), with x (..., d) normed, of weights (width, d)."""
    x, norm = _normed(x, norm, eps)
    rows, d = x.shape
    out, (plan, warps) = x.new_empty(rows, width), _plan("gate_up", rows, d, gate)
    given = _read(x, gate, rows), _read(norm, gate, rows), eps, _held(gate, rows), _held(up, rows), tables, out
    _gate_up[triton.cdiv(width, plan.outputs),](*given, rows, d, width, plan, num_warps=warps)
    return out
