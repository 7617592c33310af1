"""Attention of a few new tokens over a KV cache, as a Triton kernel for GPUs; a long cache is shared among programs.

Sums are in float32 and in an order that does not change.
Letters: N new tokens of all rows, H query heads, G key/value heads, D head size, S length of the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS = 64  # that a program reads at a time
SPAN = 256  # keys of a cache for each of the programs that share a head
PROGRAMS = 256  # above which heads are not shared further


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
