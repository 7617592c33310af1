"""A LLaMA block for a few new tokens with a KV cache, as five Triton kernels for GPUs, six for long caches.

Reading the weights takes nearly all of the time, so every product reads its weight once, and norms, biases, rotation,
SwiGLU and residuals are computed where a product reads its input or writes its output. Sums are in float32 and in an
order that does not change; results are rounded once.
Letters: N new tokens of all rows, d model width, F width of the MLP, H query heads, G key/value heads, D head size,
S length of the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # new tokens, at most: the rows of a tensor core's product


class Tile(NamedTuple):
    """What a program of a product reads at a time, and how."""

    outputs: int  # of the weight's rows; of pairs of rows, where a kernel combines two
    inputs: int
    warps: int
    stages: int  # loads that are under way at once


# of each product for one token, by sums, and for more, by tensor cores
TILES = {
    "qkv": (Tile(2, 1024, 4, 1), Tile(16, 256, 4, 4)),
    "gate_up": (Tile(2, 1024, 4, 1), Tile(16, 256, 4, 4)),
    "o": (Tile(4, 1024, 4, 1), Tile(32, 256, 4, 4)),
    "down": (Tile(4, 1024, 4, 1), Tile(32, 256, 4, 4)),
}
KEYS = 64  # that a program of attention reads at a time
SPAN = 256  # keys of a cache for each of the programs that share a head
PROGRAMS = 256  # of attention, above which heads are not shared further


@triton.jit
def _product(x, norm, eps, w, rows, d, R: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr):
    """Returns x W^T (R, M) in float32, of x (rows, d), normed if there is a norm (d,); w (M,) points to W's rows.

    The sum of the squares of x is known at the end only, so the norm's scale multiplies the result; but in float16,
    where an x without it may be too large or too small, it is computed first.
    """
    M: tl.constexpr = w.shape[0]
    scaled: tl.constexpr = norm is not None and R > 1 and x.dtype.element_ty == tl.float16
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None] * d
    squares = tl.zeros((R, K), tl.float32)
    if scaled:
        for start in range(0, d, K):
            k = start + tl.arange(0, K)[None, :]
            x_ = tl.load(x + k, mask=None if even else k < d, other=None if even else 0.0).to(tl.float32)
            squares += x_ * x_
        scale = 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    y = tl.zeros((M, K) if R == 1 else (R, M), tl.float32)
    for start in tl.range(0, d, K, num_stages=stages):
        k = start + tl.arange(0, K)[None, :]
        mask = None if even else k < d
        other = None if even else 0.0
        w_ = tl.load(w[:, None] + k, mask=mask, other=other)
        x_ = tl.load(x + k, mask=mask, other=other)
        if norm is not None:
            x_ = x_.to(tl.float32)
            weight = tl.load(norm + k, mask=mask, other=other).to(tl.float32)
            if scaled:
                x_ = x_ * scale * weight
            else:
                squares += x_ * x_
                x_ *= weight
        if R == 1:
            y += x_.to(tl.float32) * w_.to(tl.float32)
        else:
            y = tl.dot(x_.to(w_.dtype), tl.trans(w_), y, input_precision="ieee")
    if R == 1:
        y = tl.sum(y, 1)[None, :]
    if norm is not None and not scaled:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    return y


@triton.jit(do_not_specialize=["rows"])
def _qkv(
    x, norm, eps, wq, wk, wv, bq, bk, bv, cos, sin, pos, q, k, v, rows, tokens, d, heads, kv_heads, length,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    head, half = tl.program_id(1), D // 2
    turns, is_q = head < heads + kv_heads, head < heads
    w = tl.where(is_q, wq, tl.where(turns, wk, wv))
    out = tl.where(is_q, q, tl.where(turns, k, v))
    b = None if bq is None else tl.where(is_q, bq, tl.where(turns, bk, bv))
    head = tl.where(is_q, head, tl.where(turns, head - heads, head - heads - kv_heads))
    # dimensions i and i + D / 2 rotate together
    both = tl.arange(0, 2 * N)
    i = tl.minimum(tl.program_id(0) * N + both // 2, half - 1)
    row = (head * D + i + both % 2 * half).to(tl.int64)
    y = _product(x, norm, eps, w + row * d, rows, d, R, K, stages, even)
    first, second = tl.split(tl.reshape(y, (R, N, 2)))
    token, i = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    fits, at = (token < rows) & (i < half), token * D + half + i
    if b is not None:
        first += tl.load(b + head * D + i, mask=i < half, other=0.0).to(tl.float32)
        second += tl.load(b + head * D + half + i, mask=i < half, other=0.0).to(tl.float32)
    c = tl.where(turns, tl.load(cos + at, mask=fits, other=0.0).to(tl.float32), 1.0)
    s = tl.where(turns, tl.load(sin + at, mask=fits, other=0.0).to(tl.float32), 0.0)
    here = tl.load(pos + token, mask=token < rows, other=0)
    cached = ((token // tokens).to(tl.int64) * kv_heads + head) * length + here
    out += tl.where(is_q, token * heads + head, cached) * D + i
    tl.store(out, (first * c - second * s).to(q.dtype.element_ty), mask=fits)
    tl.store(out + half, (second * c + first * s).to(q.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["rows"])
def _gate_up(
    x, norm, eps, gate, up, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    both = tl.arange(0, 2 * N)
    row = tl.minimum(tl.program_id(0) * N + both // 2, width - 1).to(tl.int64)
    w = tl.where(both % 2 == 0, gate + row * d, up + row * d)
    if even:
        w = tl.multiple_of(w, 16)  # bytes
    g, u = tl.split(tl.reshape(_product(x, norm, eps, w, rows, d, R, K, stages, even), (R, N, 2)))
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    y = (g * u / (1 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + token * width + column, y, mask=(token < rows) & (column < width))


@triton.jit(do_not_specialize=["rows"])
def _add(
    x, residual, w, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
):  # fmt: skip
    row = tl.minimum(tl.program_id(0) * N + tl.arange(0, N), width - 1).to(tl.int64)
    y = _product(x, None, None, w + row * d, rows, d, R, K, stages, even)
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    at, fits = token * width + column, (token < rows) & (column < width)
    y += tl.load(residual + at, mask=fits, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=fits)


@triton.jit
def _attend(
    q, k, v, pos, out, stats, scale, tokens, heads, length, window,
    group: tl.constexpr, rows: tl.constexpr, D: tl.constexpr, size: tl.constexpr, keys: tl.constexpr,
    parts: tl.constexpr,
):  # fmt: skip
    token, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = tl.load(pos + token) + 1
    first = tl.maximum(end - window, 0)
    span = tl.cdiv(tl.cdiv(end - first, parts), keys) * keys
    begin = first + part * span
    end = tl.minimum(begin + span, end)
    one, i = tl.arange(0, rows), tl.arange(0, size)
    head = token * heads + kv_head * group + one
    fits = (one < group)[:, None] & (i < D)[None, :]
    q_ = tl.load(q + head[:, None] * D + i[None, :], mask=fits, other=0.0)
    cached = ((token // tokens).to(tl.int64) * tl.num_programs(1) + kv_head) * length * D
    k, v = k + cached, v + cached
    top, total = tl.full((rows,), -float("inf"), tl.float32), tl.zeros((rows,), tl.float32)
    y = tl.zeros((rows, size), tl.float32)
    for start in range(begin, end, keys):
        key = start + tl.arange(0, keys)
        at, seen = key[:, None] * D + i[None, :], (key < end)[:, None] & (i < D)[None, :]
        k_, v_ = tl.load(k + at, mask=seen, other=0.0), tl.load(v + at, mask=seen, other=0.0)
        scores = tl.dot(q_, tl.trans(k_), input_precision="ieee") * scale
        scores = tl.where((key < end)[None, :], scores, -float("inf"))
        before, top = top, tl.maximum(top, tl.max(scores, 1))
        shares, fading = tl.exp(scores - top[:, None]), tl.exp(before - top)
        total = total * fading + tl.sum(shares, 1)
        y = tl.dot(shares.to(v_.dtype), v_, y * fading[:, None], input_precision="ieee")
    if parts == 1:
        y = (y / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + head[:, None] * D + i[None, :], y, mask=fits)
    else:
        head = head * parts + part
        tl.store(out + head[:, None] * D + i[None, :], y, mask=fits)
        tl.store(stats + 2 * head, top, mask=one < group)
        tl.store(stats + 2 * head + 1, total, mask=one < group)


@triton.jit
def _combine(parts_of, stats, out, parts, P: tl.constexpr, D: tl.constexpr, size: tl.constexpr):
    head, part, i = tl.program_id(0).to(tl.int64), tl.arange(0, P), tl.arange(0, size)
    one = head * parts + part
    top = tl.load(stats + 2 * one, mask=part < parts, other=-float("inf"))
    share = tl.exp(top - tl.max(top, 0))
    total = tl.sum(share * tl.load(stats + 2 * one + 1, mask=part < parts, other=0.0), 0)
    fits = (part < parts)[:, None] & (i < D)[None, :]
    y = tl.load(parts_of + one[:, None] * D + i[None, :], mask=fits, other=0.0)
    y = tl.sum(y * share[:, None], 0) / total
    tl.store(out + head * D + i, y.to(out.dtype.element_ty), mask=i < D)


def _given(name: str, rows: int, d: int) -> dict[str, object]:
    """Returns the tile of a product, as its kernel's arguments."""
    tile = TILES[name][rows > 1]
    given = {"R": 1 if rows == 1 else TOKENS, "N": tile.outputs, "K": tile.inputs, "stages": tile.stages}
    return given | {"even": d % tile.inputs == 0, "num_warps": tile.warps}


def queries(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    rope: tuple[Tensor, Tensor],
    pos: Tensor,
    cache: tuple[Tensor, Tensor],
) -> Tensor:
    """Returns the rotated queries (N, H, D) of x (B, T, d); writes keys and values into the cache (B, G, S, D) each.

    Weights are (out, d), cos and sin those of ops.rotate, (B, 1, T, D), and pos (B, T) int64.
    """
    (_, tokens, d), (k, v) = x.shape, cache
    rows, (kv_heads, length, size) = x.numel() // d, k.shape[1:]
    heads = len(weights[0]) // size
    q, given = x.new_empty(rows, heads, size), _given("qkv", rows, d)
    grid = (triton.cdiv(size // 2, given["N"]), heads + 2 * kv_heads)
    sizes = (rows, tokens, d, heads, kv_heads, length, size)
    _qkv[grid](x, norm, eps, *weights, *biases, *rope, pos, q, k, v, *sizes, **given)
    return q


def attended(q: Tensor, pos: Tensor, cache: tuple[Tensor, Tensor], window: int | None) -> Tensor:
    """Returns the output (N, H, D) of attention of each query (N, H, D) over the keys up to its position."""
    (rows, heads, size), (k, v), tokens = q.shape, cache, pos.size(1)
    kv_heads, length = k.shape[1:3]
    parts = max(1, min(triton.cdiv(length, SPAN), PROGRAMS // (rows * kv_heads)))
    out, padded = torch.empty_like(q), max(16, triton.next_power_of_2(size))
    made, stats = out, out
    if parts > 1:
        made = q.new_empty(rows, heads, parts, size, dtype=torch.float32)
        stats = q.new_empty(rows, heads, parts, 2, dtype=torch.float32)
    group = heads // kv_heads
    given = (q, k, v, pos, made, stats, size**-0.5, tokens, heads, length, window or length)
    padded_group = max(16, triton.next_power_of_2(group))
    _attend[rows, kv_heads, parts](*given, group, padded_group, size, padded, KEYS, parts)
    if parts > 1:
        _combine[rows * heads,](made, stats, out, parts, triton.next_power_of_2(parts), size, padded)
    return out


def added(x: Tensor, y: Tensor, weight: Tensor, name: str) -> Tensor:
    """Returns x + W y of x (..., width), y (N, d) and a weight (width, d); `name` says which product it is."""
    (rows, d), width, out = y.shape, x.size(-1), torch.empty_like(x)
    given = _given(name, rows, d)
    _add[triton.cdiv(width, given["N"]),](y, x, weight, out, rows, d, width, **given)
    return out


def swiglu(x: Tensor, norm: Tensor, eps: float, gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(W x) * (V x) (N, F), with x (..., d) normed, of weights (F, d)."""
    d, width = x.size(-1), len(gate)
    rows = x.numel() // d
    out, given = x.new_empty(rows, width), _given("gate_up", rows, d)
    _gate_up[triton.cdiv(width, given["N"]),](x, norm, eps, gate, up, out, rows, d, width, **given)
    return out
