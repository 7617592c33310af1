"""Products of a few tokens with a weight in codes of four bits: NF4, FP4, with or without double quantisation.

A thread reads 16 bytes at once, half of a block of 64 codes, and the absmax of the block. x and the norm are read as
integers that hold two numbers each, since the codes of a byte meet two inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

THREADS = tl.constexpr(256)  # of a program that unpacks codes for one token, at most


class Tables(NamedTuple):
    """What codes are looked up in."""

    numbers: Tensor  # (16,) float32
    absmax: Tensor  # (256,) float32: of an absmax in codes
    words: Tensor  # (8, THREADS) int32: `lookup_words` for each thread


@dataclass(frozen=True)
class Codes:
    """What codes of four bits stand for."""

    tables: Tables
    asm: tuple[str, str] | None  # PTX that unpacks them; None: tables.numbers is read


def codes_of(numbers: tuple[float, ...], table: Tensor, absmax: Tensor) -> Codes:
    """Returns what codes of four bits stand for; `table` (16,) holds the same numbers."""
    words = lookup_words(numbers)
    asm = unpacking(words) if table.is_cuda else None  # Triton's interpreter knows no PTX
    words = torch.tensor(words).to(torch.int32)[:, None].expand(-1, int(THREADS)).contiguous()
    return Codes(Tables(table, absmax, words.to(table.device)), asm)


def lookup_words(numbers: tuple[float, ...]) -> list[int]:
    """Returns the upper bytes of the 16 numbers, rounded to bfloat16, in four words, then the lower ones in four more.

    Negative numbers are one less in size, since all ones follow.
    """
    halves = [0 if x == 0 else (int(torch.tensor(x).bfloat16().view(torch.int16)) & 0xFFFF) - (x < 0) for x in numbers]
    sides = [x >> 8 for x in halves], [x & 255 for x in halves]
    return [int.from_bytes(bytes(side[i : i + 4]), "little") for side in sides for i in (0, 4, 8, 12)]


def unpacking(words: Sequence[int]) -> tuple[str, str]:
    """Returns PTX that turns four bytes of codes into float32, and PTX that multiplies these with eight numbers.

    A table in memory would cost a load for each number: compiled for sm_90, the loop for one token gets 17 to 35 %
    more instructions, and six times the loads. Here the 16 numbers are in eight registers, `words`, as bfloat16: four
    hold upper bytes and four lower bytes, of codes 0 to 3, 4 to 7 and so on. The instruction prmt picks four bytes at
    once from two registers, by three bits of four codes. So:
    1. `and` leaves the lower three bits of each code; `shr` moves the upper four codes to where prmt looks.
    2. Two prmt spread the fourth bit of each code over a byte, once for either four codes. To do so they repeat the
       sign of a byte, which is the fourth bit of its high code; `shl` makes it that of its low code, too.
    3. For the upper bytes, then the lower ones: two prmt look up codes as if they were 0 to 7, and 8 to 15, and lop3
       takes of each byte the right one by the fourth bit.
    4. A prmt for each number puts its two bytes on top of a float32, above two bytes of its sign: all ones, if it is
       negative. `lookup_words` makes up for them.
    The first PTX takes codes from $8 and writes numbers of high halves of bytes to $0 to $3, of low halves to $4 to
    $7. The second takes codes from $1, numbers from $2 to $9 and `words` from $10 to $17, and writes the sum to $0.
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


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """Returns the two numbers that an integer of twice their size holds, in float32."""
    bits: tl.constexpr = dtype.primitive_bitwidth
    half: tl.constexpr = tl.int16 if bits == 16 else tl.int32
    first, second = word.to(half), (word >> bits).to(half)
    return first.to(dtype, bitcast=True).to(tl.float32), second.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _numbers(byte, table, plan: tl.constexpr):
    """Returns the two numbers that a byte of codes stands for, in float32: of its high half, then of its low half."""
    if plan.asm is None:
        byte = byte.to(tl.int32)
        return tl.load(table + (byte >> 4)), tl.load(table + (byte & 15))
    else:
        registers: tl.constexpr = "=r,=r,=r,=r,=r,=r,=r,=r,r"  # four bytes make twice four numbers
        first, second = tl.inline_asm_elementwise(plan.asm[0], registers, [byte], (tl.int32, tl.int32), True, 4)
        return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _four(words, t):
    one, two = tl.load(words + t), tl.load(words + THREADS + t)
    three, four = tl.load(words + 2 * THREADS + t), tl.load(words + 3 * THREADS + t)
    return one[None, :, None], two[None, :, None], three[None, :, None], four[None, :, None]


@triton.jit
def _eight(word, numbers, x, words, plan: tl.constexpr):
    """Returns the product of eight x with the numbers that four bytes of codes stand for, in float32."""
    if plan.asm is None:
        y = x[0] * tl.load(numbers + ((word >> 4) & 15)) + x[1] * tl.load(numbers + (word & 15))
        for i in tl.static_range(1, 4):
            y += x[2 * i] * tl.load(numbers + ((word >> (8 * i + 4)) & 15))
            y += x[2 * i + 1] * tl.load(numbers + ((word >> (8 * i)) & 15))
    else:
        given = (word,) + x + words  # noqa: RUF005, as Triton knows no star here
        y = tl.inline_asm_elementwise(plan.asm[1], "=f,r,f,f,f,f,f,f,f,f,r,r,r,r,r,r,r,r", given, tl.float32, True, 1)
    return y


@triton.jit
def _apart(x, T: tl.constexpr):
    """Returns those at 0, 1, 2 and 3 of four in turn, (1, T, 4) each."""
    a, b = tl.split(tl.reshape(x, (1, T, 4, 2, 2)))
    first, third = tl.split(a)
    second, fourth = tl.split(b)
    return first, second, third, fourth


@triton.jit
def _largest(weight, tables, block, mask, other):
    """Returns the absmax of blocks of codes; with a scale they are codes themselves."""
    largest = tl.load(weight.absmax + block, mask=mask, other=other)
    if weight.scale is not None:
        scale = tl.load(weight.scale + (block >> 8), mask=mask, other=other)
        largest = tl.load(tables.absmax + largest.to(tl.int32)) * scale + tl.load(weight.offset)
    return largest


@triton.jit
def coded_product_of_one(x, norm, eps, weight, row, tables, d, plan: tl.constexpr, dtype: tl.constexpr):
    """As `product` of triton_decode_products.py for one x; weight.w are integers of four bytes."""
    M: tl.constexpr = row.shape[0]
    K: tl.constexpr = plan.inputs
    T: tl.constexpr = K // 32
    w = weight.w + row[:, None, None] * (d // 8)
    if plan.even:
        w = tl.multiple_of(w, (16, 16, 16))  # bytes
    t = tl.arange(0, T)
    word = t[None, :, None] * 4 + tl.arange(0, 4)[None, None, :]
    pair = tl.arange(0, K // 2)
    # each thread loads them for itself, so that they stay in its registers: as constants, or known to be alike in all
    # threads, they would be copied for each use
    upper, lower = _four(tables.words, t), _four(tables.words + 4 * THREADS, t)
    squares, y = tl.zeros((K // 2,), tl.float32), tl.zeros((M, T), tl.float32)
    for start in tl.range(0, d, K, num_stages=plan.stages):
        mask_w = None if plan.even else start // 8 + word < d // 8
        mask_t = None if plan.even else (start + t * 32 < d)[None, :]
        mask = None if plan.even else start // 2 + pair < d // 2
        other = None if plan.even else 0
        codes = tl.load(w + start // 8 + word, mask=mask_w, other=other)
        block = row[:, None] * (d // 64) + ((start >> 6) + (t >> 1))[None, :]
        largest = _largest(weight, tables, block, mask_t, other)
        first, second = _halves(tl.load(x + start // 2 + pair, mask=mask, other=other), dtype)
        if norm is not None:
            squares += first * first + second * second
            one, two = _halves(tl.load(norm + start // 2 + pair, mask=mask, other=other), dtype)
            first, second = first * one, second * two
        x0, x2, x4, x6 = _apart(first, T)
        x1, x3, x5, x7 = _apart(second, T)
        numbers = (x0, x1, x2, x3, x4, x5, x6, x7)
        y += tl.sum(_eight(codes, tables.numbers, numbers, upper + lower, plan), 2) * largest
    y = tl.sum(y, 1)[None, :]
    if norm is not None:
        y *= 1 / tl.sqrt_rn(tl.sum(squares, 0) / d + eps)
    return y


@triton.jit
def coded_product(x, weight, row, tables, rows, d, plan: tl.constexpr, dtype: tl.constexpr):
    """As `product` of triton_decode_products.py for several x without a norm."""
    M: tl.constexpr = row.shape[0]
    R: tl.constexpr = plan.tokens
    K: tl.constexpr = plan.inputs
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None] * (d // 2)
    w = weight.w + row[:, None, None] * (d // 2)
    if plan.even:
        w = tl.multiple_of(w, (16, 16, 16))  # bytes
    t, pair = tl.arange(0, K // 32), tl.arange(0, K // 2)[None, :]
    byte = t[None, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    y = tl.zeros((R, M), tl.float32)
    for start in tl.range(0, d // 2, K // 2, num_stages=plan.stages):
        mask_w = None if plan.even else start + byte < d // 2
        mask_t = None if plan.even else (start + t * 16 < d // 2)[None, :]
        mask = None if plan.even else start + pair < d // 2
        other = None if plan.even else 0
        codes = tl.load(w + start + byte, mask=mask_w, other=other)
        block = row[:, None] * (d // 64) + ((start >> 5) + (t >> 1))[None, :]
        largest = _largest(weight, tables, block, mask_t, other)[:, :, None]
        first, second = _halves(tl.load(x + start + pair, mask=mask, other=other), dtype)
        high, low = _numbers(codes, tables.numbers, plan)
        high, low = (high * largest).to(dtype), (low * largest).to(dtype)
        y = tl.dot(first.to(dtype), tl.trans(tl.reshape(high, (M, K // 2))), y, input_precision="ieee")
        y = tl.dot(second.to(dtype), tl.trans(tl.reshape(low, (M, K // 2))), y, input_precision="ieee")
    return y
