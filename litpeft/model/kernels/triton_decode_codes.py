"""Products of a few tokens with a weight in codes of four bits: NF4, FP4, with or without double quantisation.

A thread reads 16 bytes at once, half of a block of 64 codes, and the absmax of the block. Each thread of a warp holds
one of the 16 numbers, and `tl.gather` takes a code's number from the thread that has it, in three instructions: shift,
mask, shuffle. From a table in memory each thread would load from a place of its own.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LANES = tl.constexpr(32)  # threads of a warp
CODES = tl.constexpr(16)


class Tables(NamedTuple):
    """What codes of four bits are looked up in."""

    numbers: Tensor  # (16,) float32
    absmax: Tensor  # (256,) float32: of an absmax in codes


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """Returns the two numbers that an integer of twice their size holds, in float32."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    first, second = word.to(half), (word >> bits).to(half)
    return first.to(dtype, bitcast=True).to(tl.float32), second.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _apart(x, T: tl.constexpr):
    """Returns those at 0, 1, 2 and 3 of four in turn, (1, T, 4) each."""
    a, b = tl.split(tl.reshape(x, (1, T, 4, 2, 2)))
    first, third = tl.split(a)
    second, fourth = tl.split(b)
    return first, second, third, fourth


@triton.jit
def _largest(weight, tables, absmax, block, mask, other):
    """Returns the largest magnitude of blocks of codes; with a scale, `absmax` holds codes of them."""
    if weight.scale is not None:
        scale = tl.load(weight.scale + (block >> 8), mask=mask, other=other)
        absmax = tl.load(tables.absmax + absmax.to(tl.int32)) * scale + tl.load(weight.offset)
    return absmax


@triton.jit
def _read(w, absmax, block, start, word, t, d, plan: tl.constexpr):
    """Returns words of codes and the absmax of their blocks from `start` on."""
    mask_w = None if plan.even else start // 8 + word < d // 8
    mask_t = None if plan.even else (start + t * 32 < d)[None, :]
    other = None if plan.even else 0
    codes = tl.load(w + start // 8 + word, mask=mask_w, other=other)
    return codes, tl.load(absmax + block + start // 64, mask=mask_t, other=other)


@triton.jit
def coded_product_of_one(x, norm, eps, weight, row, tables, d, plan: tl.constexpr, dtype: tl.constexpr):
    """As `product` of triton_decode_products.py for one x.

    weight.w are integers of four bytes; x and the norm are integers that hold two numbers each.
    """
    M: tl.constexpr = row.shape[0]
    K: tl.constexpr = plan.inputs
    T: tl.constexpr = K // 32
    L: tl.constexpr = min(T, LANES)
    w = weight.w + row[:, None] * (d // 8)
    if plan.even:
        w = tl.multiple_of(w, (16, 16))  # bytes
    t, word, pair = tl.arange(0, T), tl.arange(0, K // 8)[None, :], tl.arange(0, K // 2)
    numbers = tl.load(tables.numbers + tl.arange(0, LANES) % CODES)[None, None, :, None]
    numbers = tl.broadcast_to(numbers, (T // L, M, LANES, 4))
    squares, y = tl.zeros((K // 2,), tl.float32), tl.zeros((M, T), tl.float32)
    block = row[:, None] * (d // 64) + (t >> 1)[None, :]
    next_codes, next_absmax = _read(w, weight.absmax, block, 0, word, t, d, plan)
    for start in tl.range(0, d, K, num_stages=plan.stages):
        codes, absmax = next_codes, next_absmax
        # memory answers while this step computes; the last step reads its own again, which is near
        following = tl.minimum(start + K, (d - 1) // K * K)
        next_codes, next_absmax = _read(w, weight.absmax, block, following, word, t, d, plan)
        mask_t = None if plan.even else (start + t * 32 < d)[None, :]
        mask = None if plan.even else start // 2 + pair < d // 2
        other = None if plan.even else 0
        codes = tl.permute(tl.reshape(codes, (M, T // L, L, 4)), (1, 0, 2, 3))  # warps come first, as Triton has them
        largest = _largest(weight, tables, absmax, block + start // 64, mask_t, other)
        first, second = _halves(tl.load(x + start // 2 + pair, mask=mask, other=other), dtype)
        if norm is not None:
            squares += first * first + second * second
            one, two = _halves(tl.load(norm + start // 2 + pair, mask=mask, other=other), dtype)
            first, second = first * one, second * two
        x0, x2, x4, x6 = _apart(first, T)
        x1, x3, x5, x7 = _apart(second, T)
        # of a byte the high half comes first
        eight = (x1, x0, x3, x2, x5, x4, x7, x6)
        products = tl.zeros((M, T, 4), tl.float32)
        for i in tl.static_range(8):
            # the shift leaves a bit of the next code: 32 threads hold the 16 numbers twice, so it does not matter
            found = tl.gather(numbers, (codes >> (4 * i)) & (LANES - 1), 2)
            products += eight[i] * tl.reshape(tl.permute(found, (1, 0, 2, 3)), (M, T, 4))
        y += tl.sum(products, 2) * largest
    y = tl.sum(y, 1)[None, :]
    if norm is not None:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 0) / d + eps)
    return y


@triton.jit
def coded_product(x, weight, row, tables, rows, d, plan: tl.constexpr):
    """As `product` of triton_decode_products.py for several x without a norm."""
    M: tl.constexpr = row.shape[0]
    R: tl.constexpr = plan.tokens
    K: tl.constexpr = plan.inputs
    T: tl.constexpr = K // 32
    G: tl.constexpr = LANES // T  # rows of which a warp reads codes at once
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None] * d
    w = weight.w + row[:, None] * (d // 2)
    if plan.even:
        w = tl.multiple_of(w, (16, 16))  # bytes
    t, byte, k = tl.arange(0, T), tl.arange(0, K // 2)[None, :], tl.arange(0, K)[None, :]
    numbers = tl.load(tables.numbers + tl.arange(0, LANES) % CODES)[None, :]
    numbers = tl.broadcast_to(numbers, (M // G * 16, LANES))
    y = tl.zeros((R, M), tl.float32)
    for start in tl.range(0, d, K, num_stages=plan.stages):
        mask_w = None if plan.even else start // 2 + byte < d // 2
        mask_t = None if plan.even else (start + t * 32 < d)[None, :]
        mask = None if plan.even else start + k < d
        other = None if plan.even else 0
        codes = tl.load(w + start // 2 + byte, mask=mask_w, other=other).to(tl.int32)
        block = row[:, None] * (d // 64) + ((start >> 6) + (t >> 1))[None, :]
        absmax = tl.load(weight.absmax + block, mask=mask_t, other=other)
        largest = _largest(weight, tables, absmax, block, mask_t, other)[:, :, None]
        x_ = tl.load(x + k, mask=mask, other=other)
        codes = tl.permute(tl.reshape(codes, (M // G, G, T, 16)), (0, 3, 1, 2))
        codes = tl.reshape(codes, (M // G * 16, LANES))
        both = tl.join(tl.gather(numbers, codes >> 4, 1), tl.gather(numbers, codes & 15, 1))
        both = tl.permute(tl.reshape(both, (M // G, 16, G, T, 2)), (0, 2, 3, 1, 4))
        w_ = (tl.reshape(both, (M, T, 32)) * largest).to(x_.dtype)
        y = tl.dot(x_, tl.trans(tl.reshape(w_, (M, K))), y, input_precision="ieee")
        x += K
    return y
