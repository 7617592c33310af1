"""Operations of a block in one pass over memory, where torch makes several: Triton kernels for GPUs.

They compute in float32 and round once. Triton comes with torch's builds for GPUs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZE = 1024  # numbers that one program takes
HEADS = 8  # heads that one program rotates
CLASSES = 4096  # logits, or numbers of a row, that a program reads at a time
ROW = 32768  # numbers of a row that a program holds while it rounds them
TILE = 64  # rows and columns that one program transposes


@triton.jit
def _swiglu(gate, up, y, n, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    g, u = (tl.load(gate + at, mask=at < n).to(tl.float32), tl.load(up + at, mask=at < n).to(tl.float32))
    tl.store(y + at, (g * u / (1 + tl.exp(-g))).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def _swiglu_backward(dy, gate, up, dgate, dup, n, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    g, u = (tl.load(gate + at, mask=at < n).to(tl.float32), tl.load(up + at, mask=at < n).to(tl.float32))
    d, s = tl.load(dy + at, mask=at < n).to(tl.float32), 1 / (1 + tl.exp(-g))
    tl.store(dgate + at, (d * u * s * (1 + g * (1 - s))).to(dgate.dtype.element_ty), mask=at < n)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=at < n)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up."""
    y = torch.empty_like(gate)
    _swiglu[(triton.cdiv(y.numel(), SIZE),)](gate, up, y, y.numel(), SIZE)
    return y


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of both."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    _swiglu_backward[(triton.cdiv(dy.numel(), SIZE),)](dy, gate, up, dgate, dup, dy.numel(), SIZE)
    return dgate, dup


@triton.jit
def _rotate(x, y, cos, sin, x_head, x_token, y_head, y_token, heads, half, direction, sizes: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, i = tl.program_id(1) * sizes[0] + tl.arange(0, sizes[0])[:, None], tl.arange(0, sizes[1])[None, :]
    mask, angle = (head < heads) & (i < half), token * 2 * half + half + i
    c = tl.load(cos + angle, mask=i < half).to(tl.float32)
    s = tl.load(sin + angle, mask=i < half).to(tl.float32) * direction
    x += token * x_token + head * x_head + i
    y += token * y_token + head * y_head + i
    first, second = (tl.load(x, mask=mask).to(tl.float32), tl.load(x + half, mask=mask).to(tl.float32))
    tl.store(y, (first * c - second * s).to(y.dtype.element_ty), mask=mask)
    tl.store(y + half, (second * c + first * s).to(y.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int, y: Tensor | None = None) -> Tensor:
    """Returns x (1, heads, T, D) with its first R numbers rotated forwards (1) or back (-1).

    cos and sin (1, 1, T, R) are those of ops.rotate. With R = D the result may be written over a given y.
    """
    heads, tokens, half = x.size(1), x.size(2), cos.size(-1) // 2
    if y is None:
        y = torch.empty_like(x) if x.size(3) == 2 * half else x.clone()
    strides = (x.stride(1), x.stride(2), y.stride(1), y.stride(2))
    sizes = (HEADS, triton.next_power_of_2(half))
    _rotate[tokens, triton.cdiv(heads, HEADS)](x, y, cos, sin, *strides, heads, half, direction, sizes)
    return y


@triton.jit
def _cross_entropy(logits, targets, losses, n, size: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * n
    target, top, total, wanted = tl.load(targets + row), -float("inf"), 0.0, 0.0
    for start in range(0, n, size):
        at = start + tl.arange(0, size)
        x = tl.load(logits + at, mask=at < n, other=-float("inf")).to(tl.float32)
        wanted += tl.sum(tl.where(at == target, x, 0.0), 0)  # not loaded later: it may be overwritten by then
        before, top = top, tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(before - top) + tl.sum(tl.exp(x - top), 0)
    log_sum = top + tl.log(total)
    tl.store(losses + row, tl.where(target >= 0, log_sum - wanted, 0.0))
    for start in range(0, n, size):
        at = start + tl.arange(0, size)
        x = tl.load(logits + at, mask=at < n).to(tl.float32)
        dx = tl.where(target >= 0, tl.exp(x - log_sum) - tl.where(at == target, 1.0, 0.0), 0.0)
        tl.store(logits + at, dx.to(logits.dtype.element_ty), mask=at < n)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of each row (N,), in float32; writes the gradients over the logits (N, V).

    A row with a target below 0 does not count: its loss and its gradient are 0.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _cross_entropy[len(logits),](logits, targets, losses, logits.size(1), CLASSES, num_warps=8)
    return losses


@triton.jit
def _scaled(x, factors, at, n, scaled: tl.constexpr):
    part = tl.load(x + at, mask=at < n, other=0).to(tl.float32)
    return part * tl.load(factors + at, mask=at < n, other=0) if scaled else part


@triton.jit
def _quantize_rows(x, factors, codes, scales, n, stride, scaled: tl.constexpr, whole: tl.constexpr, size: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    x += row * stride
    part = _scaled(x, factors, at, n, scaled)
    largest = tl.max(tl.abs(part), 0)
    if not whole:
        for start in range(size, n, size):
            largest = tl.maximum(largest, tl.max(tl.abs(_scaled(x, factors, start + at, n, scaled)), 0))
    # of float32's normal numbers the smallest; e4m3's largest
    scale = tl.div_rn(tl.maximum(largest, 1.1754943508222875e-38), 448.0)
    tl.store(scales + row, scale)
    codes += row * n
    for start in range(0, size if whole else n, size):
        if not whole:
            part = _scaled(x, factors, start + at, n, scaled)
        # divided exactly: where the scale is a power of two, a sixteenth of the numbers lie between two of e4m3
        rounded = tl.minimum(tl.maximum(tl.div_rn(part, scale), -448.0), 448.0).to(codes.dtype.element_ty)
        tl.store(codes + start + at, rounded, mask=start + at < n)


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns x (n, d), times `factors` (d,) if given, as e4m3 and the float32 scale of each row (n, 1)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(x.size(1))
    size = min(width, ROW)
    given = (x, x if factors is None else factors, codes, scales, x.size(1), x.stride(0), factors is not None)
    _quantize_rows[len(x),](*given, width <= ROW, size, num_warps=max(1, min(16, size // 1024)))
    return codes, scales


@triton.jit
def _transpose(x, y, rows, columns, size: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)[:, None]
    column = tl.program_id(1).to(tl.int64) * size + tl.arange(0, size)[None, :]
    tile = tl.load(x + row * columns + column, mask=(row < rows) & (column < columns), other=0)
    row, column = tl.trans(row), tl.trans(column)
    tl.store(y + column * rows + row, tl.trans(tile), mask=(row < rows) & (column < columns))


def transposed(x: Tensor) -> Tensor:
    """Returns x (n, m) as (m, n), contiguous; torch's copy reads or writes its numbers one at a time."""
    y = torch.empty(x.size(1), x.size(0), dtype=x.dtype, device=x.device)
    _transpose[triton.cdiv(x.size(0), TILE), triton.cdiv(x.size(1), TILE)](x, y, *x.shape, TILE)
    return y


@triton.jit
def _dequantize(codes, absmax, scale, offset, table, dynamic, out, n, nested: tl.constexpr, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)  # two weights in a byte, 32 bytes in a block
    byte, block = tl.load(codes + at, mask=2 * at < n, other=0).to(tl.int32), at // 32
    largest = tl.load(absmax + block, mask=2 * at < n, other=0)
    if nested:
        largest = tl.load(dynamic + largest.to(tl.int32))
        largest = largest * tl.load(scale + block // 256, mask=2 * at < n, other=0.0) + tl.load(offset)
    first, second = (tl.load(table + (byte >> 4)) * largest, tl.load(table + (byte & 15)) * largest)
    both = tl.program_id(0).to(tl.int64) * 2 * size + tl.arange(0, 2 * size)
    tl.store(out + both, tl.interleave(first, second).to(out.dtype.element_ty), mask=both < n)


def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    table: Tensor,
    dynamic: Tensor,
    out: Tensor,
) -> Tensor:
    """Returns `out`, filled with the weights of packed codes in blocks of 64; with `scale` the absmax are codes, too.

    `table` maps 16 codes to numbers, `dynamic` the 256 codes of an absmax. Computes in float32 and rounds once.
    """
    nested, n = scale is not None, out.numel()
    given = (codes, absmax, scale if nested else absmax, offset if nested else absmax, table, dynamic, out, n)
    _dequantize[(triton.cdiv(n, 2 * SIZE),)](*given, nested, SIZE, enable_fp_fusion=False)
    return out
