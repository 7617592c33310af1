"""A LLaMA block for a few new tokens with a KV cache, as five Triton kernels for GPUs, six for long caches.

Reading the weights takes nearly all of the time, so every product reads its weight once, and norms, biases, rotation,
SwiGLU and residuals are computed where a product reads its input or writes its output. Sums are in float32 and in an
order that does not change; results are rounded once.
Letters: N new tokens of all rows, d model width, F width of the MLP, H query heads, G key/value heads, D head size,
S length of the cache.
"""

from dataclasses import dataclass
from functools import cache
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
    "qkv": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "gate_up": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "o": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
    "down": (Tile(4, 1024, 1, 1), Tile(32, 128, 4, 3)),
}
KEYS = 64  # that a program of attention reads at a time
SPAN = 256  # keys of a cache for each of the programs that share a head
REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r")  # four bytes make twice four numbers
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
        first, second = tl.inline_asm_elementwise(asm, REGISTERS, [byte], (tl.int32, tl.int32), True, 4)
        return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


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
    scaled: tl.constexpr = norm is not None and R > 1 and dtype == tl.float16
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None, None] * (d // 2)
    w += row[:, None, None] * (d // 2)
    if even:
        w = tl.multiple_of(w, (16, 16, 16))  # bytes
    t, byte = tl.arange(0, T), tl.arange(0, T)[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    squares = tl.zeros((R, T, 16), tl.float32)
    if scaled:
        for start in range(0, d // 2, K // 2):
            mask = None if even else start + byte < d // 2
            first, second = _halves(tl.load(x + start + byte, mask=mask, other=None if even else 0), dtype)
            squares += first * first + second * second
        factor = 1 / tl.sqrt_rn(tl.sum(tl.sum(squares, 2), 1)[:, None, None] / d + eps)
    y = tl.zeros((M, T) if R == 1 else (R, M), tl.float32)
    for start in tl.range(0, d // 2, K // 2, num_stages=stages):
        mask = None if even else start + byte < d // 2
        mask_t = None if even else (start + t * 16 < d // 2)[None, :]
        other = None if even else 0
        codes = tl.load(w + start + byte, mask=mask, other=other)
        block = row[:, None] * (d // 64) + ((start >> 5) + (t >> 1))[None, :]
        largest = tl.load(absmax + block, mask=mask_t, other=other)
        if scale is not None:
            largest = tl.load(dynamic + largest.to(tl.int32))
            largest = largest * tl.load(scale + (block >> 8), mask=mask_t, other=other) + tl.load(offset)
        first, second = _halves(tl.load(x + start + byte, mask=mask, other=other), dtype)
        if norm is not None:
            one, two = _halves(tl.load(norm + start + byte, mask=mask, other=other), dtype)
            if scaled:
                first, second = first * factor * one, second * factor * two
            else:
                squares += first * first + second * second
                first, second = first * one, second * two
        high, low = _numbers(codes, table, asm)
        if R == 1:
            y += tl.sum(high * first + low * second, 2) * largest
        else:
            high, low = (high * largest[:, :, None]).to(dtype), (low * largest[:, :, None]).to(dtype)
            first, second = tl.reshape(first.to(dtype), (R, K // 2)), tl.reshape(second.to(dtype), (R, K // 2))
            y = tl.dot(first, tl.trans(tl.reshape(high, (M, K // 2))), y, input_precision="ieee")
            y = tl.dot(second, tl.trans(tl.reshape(low, (M, K // 2))), y, input_precision="ieee")
    if R == 1:
        y = tl.sum(y, 1)[None, :]
    if norm is not None and not scaled:
        y *= 1 / tl.sqrt_rn(tl.sum(tl.sum(squares, 2), 1)[:, None] / d + eps)
    return y


@triton.jit
def _product(
    x, norm, eps, w, absmax, scale, offset, row, table, dynamic, rows, d,
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
    else:
        given = (w, absmax, scale, offset, row, table, dynamic, rows, d)
        y = _coded_product(x, norm, eps, *given, R, K, stages, even, dtype, asm)
    return y


@triton.jit
def _one_of(q, k, v, is_q, turns):
    """Returns the pointer for queries, keys or values."""
    return None if q is None else tl.where(is_q, q, tl.where(turns, k, v))


@triton.jit(do_not_specialize=["rows"])
def _qkv(
    x, norm, eps, wq, aq, sq, oq, wk, ak, sk, ok, wv, av, sv, ov, table, dynamic, bq, bk, bv, cos, sin, pos, q, k, v,
    rows, tokens, d, heads, kv_heads, length,
    D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr,
    asm: tl.constexpr,
):  # fmt: skip
    head, half = tl.program_id(1), D // 2
    turns, is_q = head < heads + kv_heads, head < heads
    w, absmax = _one_of(wq, wk, wv, is_q, turns), _one_of(aq, ak, av, is_q, turns)
    scale, offset = _one_of(sq, sk, sv, is_q, turns), _one_of(oq, ok, ov, is_q, turns)
    b, out = _one_of(bq, bk, bv, is_q, turns), _one_of(q, k, v, is_q, turns)
    head = tl.where(is_q, head, tl.where(turns, head - heads, head - heads - kv_heads))
    # dimensions i and i + D / 2 rotate together
    both = tl.arange(0, 2 * N)
    i = tl.minimum(tl.program_id(0) * N + both // 2, half - 1)
    row = (head * D + i + both % 2 * half).to(tl.int64)
    given = (w, absmax, scale, offset, row, table, dynamic, rows, d)
    y = _product(x, norm, eps, *given, R, K, stages, even, q.dtype.element_ty, asm)
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
    x, norm, eps, wg, ag, sg, og, wu, au, su, ou, table, dynamic, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    both = tl.arange(0, 2 * N)
    row, is_gate = tl.minimum(tl.program_id(0) * N + both // 2, width - 1).to(tl.int64), both % 2 == 0
    w, absmax, scale, offset = tl.where(is_gate, wg, wu), None, None, None
    if ag is not None:
        w, absmax = w[:, None, None], tl.where(is_gate, ag, au)[:, None]
    if sg is not None:
        scale, offset = tl.where(is_gate, sg, su)[:, None], tl.where(is_gate, og, ou)[:, None]
    given = (w, absmax, scale, offset, row, table, dynamic, rows, d)
    y = _product(x, norm, eps, *given, R, K, stages, even, out.dtype.element_ty, asm)
    g, u = tl.split(tl.reshape(y, (R, N, 2)))
    token, column = tl.arange(0, R)[:, None], tl.program_id(0) * N + tl.arange(0, N)[None, :]
    y = (g * u / (1 + tl.exp(-g))).to(out.dtype.element_ty)
    tl.store(out + token * width + column, y, mask=(token < rows) & (column < width))


@triton.jit(do_not_specialize=["rows"])
def _add(
    x, residual, w, absmax, scale, offset, table, dynamic, out, rows, d, width,
    R: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr, even: tl.constexpr, asm: tl.constexpr,
):  # fmt: skip
    row = tl.minimum(tl.program_id(0) * N + tl.arange(0, N), width - 1).to(tl.int64)
    given = (w, absmax, scale, offset, row, table, dynamic, rows, d)
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
    asm: str | None  # PTX that unpacks four bytes; None: the table is read


Weight = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # dense, or codes, absmax, and its scale and offset


@cache
def unpacking(numbers: tuple[float, ...]) -> str:
    """Returns PTX that turns four bytes into the float32 of the codes in their high halves, and in their low ones.

    prmt picks bytes from eight by three bits of a code: the upper two bytes of the number (it is rounded to bfloat16)
    if the code's fourth bit is 0, and if it is 1. The lower two bytes of the number are its sign: all ones for a
    negative number, whose upper half is one less for that.
    """
    halves = [0 if x == 0 else _bfloat16(x) - (x < 0) for x in numbers]
    sides = {"h": [x >> 8 for x in halves], "l": [x & 255 for x in halves]}
    words = {side: [int.from_bytes(bytes(x[i : i + 4]), "little") for i in (0, 4, 8, 12)] for side, x in sides.items()}
    lines = ["{", ".reg .b32 s, t, u, m, n, a, b, h, l;"]
    lines += ["and.b32 s, $8, 0x77777777;", "shr.u32 t, s, 16;", "shl.b32 u, $8, 4;"]
    lines += ["prmt.b32 m, u, $8, 0xD9C8;", "prmt.b32 n, u, $8, 0xFBEA;"]  # the fourth bit of each code, eight times
    for part, (code, mask) in enumerate((("s", "m"), ("t", "n"))):
        for side, word in words.items():
            low, high = (", ".join(f"0x{x:08X}" for x in word[at : at + 2]) for at in (0, 2))
            lines += [f"prmt.b32 a, {low}, {code};", f"prmt.b32 b, {high}, {code};"]
            lines += [f"lop3.b32 {side}, a, b, {mask}, 0xD8;"]
        for i in range(4):
            out = 2 * part + i // 2 + (0 if i % 2 else 4)
            lines.append(f"prmt.b32 ${out}, l, h, 0x{4 + i:X}{i:X}{12 + i:X}{12 + i:X};")
    return "\n".join([*lines, "}"])


def _bfloat16(x: float) -> int:
    return int(torch.tensor(x).bfloat16().view(torch.int16)) & 0xFFFF


def _given(name: str, rows: int, d: int, weight: Weight, codes: Codes | None) -> dict[str, object]:
    """Returns the tile of a product, and how codes are unpacked, as its kernel's arguments."""
    tile = (TILES if weight[1] is None else CODED_TILES)[name][rows > 1]
    given = {"R": 1 if rows == 1 else TOKENS, "N": tile.outputs, "K": tile.inputs, "stages": tile.stages}
    table, dynamic, asm = (None, None, None) if codes is None else (codes.table, codes.dynamic, codes.asm)
    given |= {"even": d % tile.inputs == 0, "num_warps": tile.warps}
    return given | {"table": table, "dynamic": dynamic, "asm": asm}


def _read(x: Tensor, weight: Weight) -> Tensor:
    """Returns x as a product with the weight reads it: two numbers at once, if the weight is in codes."""
    return x if weight[1] is None else x.view(torch.int32 if x.itemsize == 2 else torch.int64)


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
    read, matrices = (_read(x, weights[0]), _read(norm, weights[0]), eps), [t for one in weights for t in one]
    names = ("wq", "aq", "sq", "oq", "wk", "ak", "sk", "ok", "wv", "av", "sv", "ov")
    given |= dict(zip(names, matrices, strict=True)) | dict(zip(("bq", "bk", "bv"), biases, strict=True))
    given |= {"cos": rope[0], "sin": rope[1], "pos": pos, "q": q, "k": k, "v": v, "rows": rows, "tokens": tokens}
    given |= {"d": d, "heads": heads, "kv_heads": kv_heads, "length": length, "D": size}
    _qkv[triton.cdiv(size // 2, given["N"]), heads + 2 * kv_heads](*read, **given)
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
    _add[triton.cdiv(width, given["N"]),](_read(y, weight), x, *weight, **given)
    return out


def swiglu(
    x: Tensor, norm: Tensor, eps: float, gate: Weight, up: Weight, width: int, codes: Codes | None = None
) -> Tensor:
    """Returns silu(W x) * (V x) (N, width), with x (..., d) normed, of weights (width, d)."""
    d = x.size(-1)
    rows = x.numel() // d
    out, given = x.new_empty(rows, width), _given("gate_up", rows, d, gate, codes)
    given |= {"out": out, "rows": rows, "d": d, "width": width}
    _gate_up[triton.cdiv(width, given["N"]),](_read(x, gate), _read(norm, gate), eps, *gate, *up, **given)
    return out
