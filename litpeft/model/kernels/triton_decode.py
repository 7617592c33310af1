"""A LLaMA block for a few new tokens with a KV cache, as five Triton kernels for GPUs, six for long caches.

Reading the weights takes nearly all of the time, so every product reads its weight once, and norms, biases, rotation,
SwiGLU and residuals are computed where a product reads its input or writes its output. Sums are in float32 and in an
order that does not change; results are rounded once.
Letters: N new tokens of all rows, d model width, F width of the MLP, H query heads, G key/value heads, D head size,
S length of the cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# the same for weights in codes of four bits, of which a thread takes 32 at a time
CODED_TILES = {
    "qkv": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "gate_up": (Tile(2, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "o": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "down": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
}
KEYS = 64  # that a program of attention reads at a time
SPAN = 256  # keys of a cache for each of the programs that share a head
THREADS = tl.constexpr(256)  # of a program that unpacks codes for one token, at most
PROGRAMS = 256  # of attention, above which heads are not shared further


@triton.jit
def _dense_product(
    x, norm, eps, w, rows, d,
    R: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """As `_product`; w (M,) points to the rows of a weight (out, d)."""
    M: tl.constexpr = w.shape[0]
    scaled: tl.constexpr = norm is not None and R > 1 and dtype == tl.float16
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
            y = tl.dot(x_.to(dtype), tl.trans(w_), y, input_precision="ieee")
    if R == 1:
        y = tl.sum(y, 1)[None, :]
    if norm is not None and not scaled:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    return y


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """Returns the two numbers that an integer of twice their size holds, in float32."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    first, second = word.to(half), (word >> bits).to(half)
    return first.to(dtype, bitcast=True).to(tl.float32), second.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _numbers(byte, table, asm: tl.constexpr):
    """Returns the two numbers that a byte of codes stands for, in float32: of its high half, then of its low half."""
    if asm is None:
        byte = byte.to(tl.int32)
        return tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))
    else:
        registers: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r"  # four bytes make twice four numbers
        first, second = tl.inline_asm_elementwise(asm[0], registers, [byte], (tl.int32, tl.int32), True, 4)
        return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _four(words, t):
    one, two = tl.load(words + t), tl.load(words + THREADS + t)
    three, four = tl.load(words + 2 * THREADS + t), tl.load(words + 3 * THREADS + t)
    return one[None, :, None], two[None, :, None], three[None, :, None], four[None, :, None]


@triton.jit
def _eight(word, table, x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7, asm: tl.constexpr):
    """Returns the product of eight numbers with those that four bytes of codes stand for, in float32."""
    if asm is None:
        high, low = (word >> 4) & 0x0F0F0F0F, word & 0x0F0F0F0F
        y = x0 * tl.load(table + (high & 15)) + x1 * tl.load(table + (low & 15))
        y += x2 * tl.load(table + ((high >> 8) & 15)) + x3 * tl.load(table + ((low >> 8) & 15))
        y += x4 * tl.load(table + ((high >> 16) & 15)) + x5 * tl.load(table + ((low >> 16) & 15))
        y += x6 * tl.load(table + ((high >> 24) & 15)) + x7 * tl.load(table + ((low >> 24) & 15))
    else:
        given = [word, x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7]
        y = tl.inline_asm_elementwise(asm[1], "=f,r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r", given, tl.float32, True, 1)
    return y


@triton.jit
def _largest(absmax, scale, offset, dynamic, block, mask, other):
    """Returns the absmax of blocks of codes; with a scale they are codes themselves."""
    largest = tl.load(absmax + block, mask=mask, other=other)
    if scale is not None:
        largest = tl.load(dynamic + largest.to(tl.int32))
        largest = largest * tl.load(scale + (block >> 8), mask=mask, other=other) + tl.load(offset)
    return largest


@triton.jit
def _coded_product_of_one(
    x, norm, eps, w, absmax, scale, offset, row, table, words, dynamic, d,
    K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, dtype: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    """As `_coded_product` for one x; w are integers of four bytes, of which a thread reads four: half of a block."""
    M: tl.constexpr = row.shape[0]
    T: tl.constexpr = K // 32
    w += row[:, None, None] * (d // 8)
    if even:
        w = tl.multiple_of(w, (16, 16, 16))  # bytes
    t = tl.arange(0, T)
    word = t[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    pair = tl.arange(0, K // 2)
    # each thread loads them for itself, so that they stay in its registers: as constants, or known to be alike in all
    # threads, they would be copied for each use
    w0, w1, w2, w3 = _four(words, t)
    w4, w5, w6, w7 = _four(words + 4 * THREADS, t)
    squares, y = tl.zeros((K // 2,), tl.float32), tl.zeros((M, T), tl.float32)
    for start in tl.range(0, d, K, num_stages=stages):
        mask_w = None if even else start // 8 + word < d // 8
        mask_t = None if even else (start + t * 32 < d)[None, :]
        mask = None if even else start // 2 + pair < d // 2
        other = None if even else 0
        codes = tl.load(w + start // 8 + word, mask=mask_w, other=other)
        block = row[:, None] * (d // 64) + ((start >> 6) + (t >> 1))[None, :]
        largest = _largest(absmax, scale, offset, dynamic, block, mask_t, other)
        first, second = _halves(tl.load(x + start // 2 + pair, mask=mask, other=other), dtype)
        if norm is not None:
            squares += first * first + second * second
            one, two = _halves(tl.load(norm + start // 2 + pair, mask=mask, other=other), dtype)
            first, second = first * one, second * two
        # of eight numbers in turn, first holds 0, 2, 4 and 6
        a, b = tl.split(tl.reshape(first, (1, T, 4, 2, 2)))
        x0, x4 = tl.split(a)
        x2, x6 = tl.split(b)
        a, b = tl.split(tl.reshape(second, (1, T, 4, 2, 2)))
        x1, x5 = tl.split(a)
        x3, x7 = tl.split(b)
        given = (x0, x1, x2, x3, x4, x5, x6, x7, w0, w1, w2, w3, w4, w5, w6, w7)
        y += tl.sum(_eight(codes, table, *given, asm), 2) * largest
    y = tl.sum(y, 1)[None, :]
    if norm is not None:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 0) / d + eps)
    return y


@triton.jit
def _coded_product(
    x, norm, eps, w, absmax, scale, offset, row, table, dynamic, rows, d,
    R: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, dtype: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    """As `_product`, of codes of four bits. x and the norm are integers that hold two numbers each.

    A thread reads 16 bytes, half of a block of codes, and the block's absmax.
    """
    M: tl.constexpr = row.shape[0]
    T: tl.constexpr = K // 32
    scaled: tl.constexpr = norm is not None and dtype == tl.float16
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None] * (d // 2)
    w += row[:, None, None] * (d // 2)
    if even:
        w = tl.multiple_of(w, (16, 16, 16))  # bytes
    t, pair = tl.arange(0, T), tl.arange(0, K // 2)[None, :]
    byte = t[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    squares = tl.zeros((R, K // 2), tl.float32)
    if scaled:
        for start in range(0, d // 2, K // 2):
            mask = None if even else start + pair < d // 2
            first, second = _halves(tl.load(x + start + pair, mask=mask, other=None if even else 0), dtype)
            squares += first * first + second * second
        factor = 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    y = tl.zeros((R, M), tl.float32)
    for start in tl.range(0, d // 2, K // 2, num_stages=stages):
        mask_w = None if even else start + byte < d // 2
        mask_t = None if even else (start + t * 16 < d // 2)[None, :]
        mask = None if even else start + pair < d // 2
        other = None if even else 0
        codes = tl.load(w + start + byte, mask=mask_w, other=other)
        block = row[:, None] * (d // 64) + ((start >> 5) + (t >> 1))[None, :]
        largest = _largest(absmax, scale, offset, dynamic, block, mask_t, other)[:, :, None]
        first, second = _halves(tl.load(x + start + pair, mask=mask, other=other), dtype)
        if norm is not None:
            one, two = _halves(tl.load(norm + start + pair, mask=mask, other=other), dtype)
            if scaled:
                first, second = first * factor * one, second * factor * two
            else:
                squares += first * first + second * second
                first, second = first * one, second * two
        high, low = _numbers(codes, table, asm)
        high, low = (high * largest).to(dtype), (low * largest).to(dtype)
        y = tl.dot(first.to(dtype), tl.trans(tl.reshape(high, (M, K // 2))), y, input_precision="ieee")
        y = tl.dot(second.to(dtype), tl.trans(tl.reshape(low, (M, K // 2))), y, input_precision="ieee")
    if norm is not None and not scaled:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    return y


@triton.jit
def _product(
    x, norm, eps, w, absmax, scale, offset, row, table, words, dynamic, rows, d,
    R: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, dtype: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    """Returns x W^T (R, M) in float32, of x (rows, d), normed if there is a norm (d,), and the rows (M,) of W.

    The sum of the squares of x is known at the end only, so the norm's scale multiplies the result; but in float16,
    where an x without it may be too large or too small, it is computed first.
    """
    if absmax is None:
        w += row * d
        if even:
            w = tl.multiple_of(w, 16)  # bytes
        y = _dense_product(x, norm, eps, w, rows, d, R, K, stages, even, dtype)
    elif R == 1:
        given = (w, absmax, scale, offset, row, table, words, dynamic, d)
        y = _coded_product_of_one(x, norm, eps, *given, K, stages, even, dtype, asm)
    else:
        given = (w, absmax, scale, offset, row, table, dynamic, rows, d)
        y = _coded_product(x, norm, eps, *given, R, K, stages, even, dtype, asm)
    return y


@triton.jit
def _one_of(q, k, v, is_q, turns):
    """Returns the pointer for queries, keys or values."""
    return tl.where(is_q, q, tl.where(turns, k, v))


@triton.jit(do_not_specialize=["rows"])
def _qkv(
    x, norm, eps, wq, aq, sq, oq, wk, ak, sk, ok, wv, av, sv, ov, table, words, dynamic, bq, bk, bv, cos, sin, pos,
    q, k, v, rows, tokens, d, heads, kv_heads, length,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
    asm: tl.constexpr,
):  # fmt: skip
    head, half = tl.program_id(1), D // 2
    turns, is_q = head < heads + kv_heads, head < heads
    w, out, absmax, scale, offset = _one_of(wq, wk, wv, is_q, turns), _one_of(q, k, v, is_q, turns), None, None, None
    if aq is not None:
        absmax = _one_of(aq, ak, av, is_q, turns)
    if sq is not None:
        scale, offset = _one_of(sq, sk, sv, is_q, turns), _one_of(oq, ok, ov, is_q, turns)
    head = tl.where(is_q, head, tl.where(turns, head - heads, head - heads - kv_heads))
    # dimensions i and i + D / 2 rotate together
    both = tl.arange(0, 2 * N)
    i = tl.minimum(tl.program_id(0) * N + both // 2, half - 1)
    row = (head * D + i + both % 2 * half).to(tl.int64)
    given = (w, absmax, scale, offset, row, table, words, dynamic, rows, d)
    y = _product(x, norm, eps, *given, R, K, stages, even, q.dtype.element_ty, asm)
    first, second = tl.split(tl.reshape(y, (R, N, 2)))
    token, i = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    fits, at = (token < rows) & (i < half), token * D + half + i
    if bq is not None:
        b = _one_of(bq, bk, bv, is_q, turns)
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
    x, norm, eps, wg, ag, sg, og, wu, au, su, ou, table, words, dynamic, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    both = tl.arange(0, 2 * N)
    row, is_gate = tl.minimum(tl.program_id(0) * N + both // 2, width - 1).to(tl.int64), both % 2 == 0
    w, absmax, scale, offset = tl.where(is_gate, wg, wu), None, None, None
    if ag is not None:
        w, absmax = w[:, None, None], tl.where(is_gate, ag, au)[:, None]
    if sg is not None:
        scale, offset = tl.where(is_gate, sg, su)[:, None], tl.where(is_gate, og, ou)[:, None]
    given = (w, absmax, scale, offset, row, table, words, dynamic, rows, d)
    y = _product(x, norm, eps, *given, R, K, stages, even, out.dtype.element_ty, asm)
    g, u = tl.split(tl.reshape(y, (R, N, 2)))
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    y = (g * u / (1 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + token * width + column, y, mask=(token < rows) & (column < width))


@triton.jit(do_not_specialize=["rows"])
def _add(
    x, residual, w, absmax, scale, offset, table, words, dynamic, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    row = tl.minimum(tl.program_id(0) * N + tl.arange(0, N), width - 1).to(tl.int64)
    given = (w, absmax, scale, offset, row, table, words, dynamic, rows, d)
    y = _product(x, None, None, *given, R, K, stages, even, out.dtype.element_ty, asm)
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


@dataclass(frozen=True)
class Codes:
    """What codes of four bits stand for."""

    table: Tensor  # (16,) float32
    dynamic: Tensor  # (256,) float32: the codes of an absmax, with double quantisation
    words: Tensor  # (8, THREADS) int32, what the PTX looks codes up in, for each thread
    asm: tuple[str, str] | None  # PTX that reads them; None: the table is read


Weight = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # dense, or codes, absmax, and its scale and offset


def lookup_words(numbers: tuple[float, ...]) -> list[int]:
    """Returns the upper bytes of the 16 numbers, rounded to bfloat16, in four words, then the lower ones in four more.

    Negative numbers are one less in size, since all ones follow.
    """
    halves = [0 if x == 0 else (int(torch.tensor(x).bfloat16().view(torch.int16)) & 0xFFFF) - (x < 0) for x in numbers]
    sides = [x >> 8 for x in halves], [x & 255 for x in halves]
    return [int.from_bytes(bytes(side[i : i + 4]), "little") for side in sides for i in (0, 4, 8, 12)]


def codes_of(numbers: tuple[float, ...], table: Tensor, dynamic: Tensor) -> Codes:
    """Returns what codes of four bits stand for; `table` (16,) holds the same numbers."""
    words = lookup_words(numbers)
    asm = unpacking(words) if table.is_cuda else None  # Triton's interpreter knows no PTX
    words = torch.tensor(words).to(torch.int32)[:, None].expand(-1, int(THREADS)).contiguous()
    return Codes(table, dynamic, words.to(table.device), asm)


def unpacking(words: Sequence[int]) -> tuple[str, str]:
    """Returns PTX that turns four bytes of codes into float32, and PTX that multiplies these with eight numbers.

    The first takes the bytes from $8 and writes the numbers of their high halves to $0 to $3, of the low halves to $4
    to $7. The second takes the bytes from $1, the numbers from $2 to $9, and `words` from $10 to $17. prmt picks bytes
    from eight by three bits of a code, which is done for both values of its fourth bit. Below the upper two bytes of
    a number come two of its sign: all ones if it is negative.
    """

    def lines(word: str, words: Sequence[str], write: Callable[[int, str], list[str]]) -> str:
        """`write` takes the number of a code, the high half of a byte first, and the operands that make its number."""
        made = ["{", ".reg .b32 s, t, u, m, n, a, b, h, l;", ".reg .f32 x;"]
        made += [f"and.b32 s, {word}, 0x77777777;", "shr.u32 t, s, 16;", f"shl.b32 u, {word}, 4;"]
        # the fourth bit of each code, eight times
        made += [f"prmt.b32 m, u, {word}, 0xD9C8;", f"prmt.b32 n, u, {word}, 0xFBEA;"]
        for part, (code, mask) in enumerate((("s", "m"), ("t", "n"))):
            for side, four in (("h", words[:4]), ("l", words[4:])):
                made += [f"prmt.b32 a, {four[0]}, {four[1]}, {code};", f"prmt.b32 b, {four[2]}, {four[3]}, {code};"]
                made += [f"lop3.b32 {side}, a, b, {mask}, 0xD8;"]
            for i in range(4):
                made += write(4 * part + (i ^ 1), f"l, h, 0x{4 + i:X}{i:X}{12 + i:X}{12 + i:X}")
        return "\n".join([*made, "}"])

    def added(at: int, made: str) -> list[str]:
        step = "mul.rn.f32 $0, x" if at == 1 else "fma.rn.f32 $0, x"
        return [f"prmt.b32 x, {made};", f"{step}, ${2 + at}{'' if at == 1 else ', $0'};"]

    alone = lines("$8", [f"0x{w:08X}" for w in words], lambda at, made: [f"prmt.b32 ${at // 2 + at % 2 * 4}, {made};"])
    return alone, lines("$1", [f"${10 + i}" for i in range(8)], added)


def _given(name: str, rows: int, d: int, weight: Weight, codes: Codes | None) -> dict[str, object]:
    """Returns the tile of a product, and how codes are unpacked, as its kernel's arguments."""
    tile = (TILES if weight[1] is None else CODED_TILES)[name][rows > 1]
    given = {"R": 1 if rows == 1 else TOKENS, "N": tile.outputs, "K": tile.inputs, "stages": tile.stages}
    held = vars(codes) if codes is not None else dict.fromkeys(("table", "dynamic", "words", "asm"))
    return given | {"even": d % tile.inputs == 0, "num_warps": tile.warps} | held


def _read(x: Tensor, weight: Weight) -> Tensor:
    """Returns x as a product with the weight reads it: two numbers at once, if the weight is in codes."""
    return x if weight[1] is None else x.view(torch.int32 if x.itemsize == 2 else torch.int64)


def _held(weight: Weight, rows: int) -> Weight:
    """Returns a weight as a product reads it: codes for one token four bytes at once."""
    return (weight[0].view(torch.int32), *weight[1:]) if weight[1] is not None and rows == 1 else weight


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
    codes: Codes | None = None,
) -> Tensor:
    """Returns the rotated queries (N, H, D) of x (B, T, d); writes keys and values into the cache (B, G, S, D) each.

    Weights are (out, d), `heads` is H, cos and sin are those of ops.rotate, (B, 1, T, D), and pos (B, T) is int64.
    """
    (count, tokens, d), (k, v) = x.shape, cache
    rows, (kv_heads, length, size) = count * tokens, k.shape[1:]
    q, given = x.new_empty(rows, heads, size), _given("qkv", rows, d, weights[0], codes)
    names = ("wq", "aq", "sq", "oq", "wk", "ak", "sk", "ok", "wv", "av", "sv", "ov", "bq", "bk", "bv")
    held = [tensor for weight in weights for tensor in _held(weight, rows)]
    given |= dict(zip(names, (*held, *biases), strict=True))
    given |= {"cos": rope[0], "sin": rope[1], "pos": pos, "q": q, "k": k, "v": v, "rows": rows, "tokens": tokens}
    given |= {"d": d, "heads": heads, "kv_heads": kv_heads, "length": length, "D": size}
    _qkv[triton.cdiv(size // 2, given["N"]), heads + 2 * kv_heads](
        _read(x, weights[0]), _read(norm, weights[0]), eps, **given
    )
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


def added(x: Tensor, y: Tensor, weight: Weight, name: str, codes: Codes | None = None) -> Tensor:
    """Returns x + W y of x (..., width), y (N, d) and a weight (width, d); `name` says which product it is."""
    (rows, d), width, out = y.shape, x.size(-1), torch.empty_like(x)
    given = _given(name, rows, d, weight, codes) | {"out": out, "rows": rows, "d": d, "width": width}
    _add[triton.cdiv(width, given["N"]),](_read(y, weight), x, *_held(weight, rows), **given)
    return out


def swiglu(
    x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight, width: int, codes: Codes | None = None
) -> Tensor:
    """Returns silu(W x) * (V x) (N, width), with x (..., d) normed, of weights (width, d)."""
    d = x.size(-1)
    rows = x.numel() // d
    out, given = x.new_empty(rows, width), _given("gate_up", rows, d, gate, codes)
    given |= {"out": out, "rows": rows, "d": d, "width": width}
    _gate_up[triton.cdiv(width, given["N"]),](
        _read(x, gate), _read(norm, gate), eps, *_held(gate, rows), *_held(up, rows), **given
    )
    return out
