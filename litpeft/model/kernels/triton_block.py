"""What a LLaMA block in training does beside its large products, as Triton kernels for GPUs.

Each kernel reads its inputs once, computes in float32 and rounds once. A kernel that reads y also adds the low-rank
update B t to it. So the update needs no kernel of its own; t = A x (N, r) is small.
Letters: N tokens, d model width, F width of the MLP, H heads, D head size, r rank.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from litpeft.model.kernels import triton as kernels

ROWS, COLUMNS = 32, 64  # of the tile that one program takes
FEW = 8  # ranks up to which SwiGLU's backward pass adds updates as sums, 13 % faster on an H200 than as products
FEW_TILE = 4, 512, 2  # rows, columns and warps: each warp has columns of its own
SMALLEST = 16  # size that tl.dot takes; smaller factors are padded with zeros


@triton.jit
def _updated(
    y, t, b, row, column, n, width, t_row: tl.constexpr, r: tl.constexpr, at, mask, R: tl.constexpr,
    across: tl.constexpr = False, few: tl.constexpr = False,
):  # fmt: skip
    """Returns the tile y + t b^T in float32: t (N, r), b (width, r), or (r, width) if `across`; R is r, padded.

    With `few` ranks, `across`, as sums: then nothing is exchanged between threads.
    """
    x = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    if few:
        for k in tl.static_range(r):
            t_ = tl.load(t + row * t_row + k, mask=row < n, other=0.0).to(tl.float32)
            b_ = tl.load(b + k * width + column, mask=column < width, other=0.0).to(tl.float32)
            x += t_[:, None] * b_[None, :]
    elif R > 0:
        k = tl.arange(0, R)
        t_ = tl.load(t + row[:, None] * t_row + k[None, :], mask=(row < n)[:, None] & (k < r)[None, :], other=0.0)
        places = k[:, None] * width + column[None, :] if across else column[None, :] * r + k[:, None]
        b_ = tl.load(b + places, mask=(column < width)[None, :] & (k < r)[:, None], other=0.0)
        x = tl.dot(t_, b_, x, input_precision="ieee")
    return x


@triton.jit
def _add(
    y, t, b, z, out, n, width, t_row: tl.constexpr, r: tl.constexpr, R: tl.constexpr, adds: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * tile[0] + tl.arange(0, tile[0])
    column = tl.program_id(0) * tile[1] + tl.arange(0, tile[1])
    at, mask = row[:, None] * width + column[None, :], (row < n)[:, None] & (column < width)[None, :]
    x = _updated(y, t, b, row, column, n, width, t_row, r, at, mask, R)
    if adds:
        x += tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


def updated(y: Tensor, t: Tensor, b: Tensor, z: Tensor | None = None) -> Tensor:
    """Returns y + t b^T of y (N, width), t (N, r) and b (width, r); with z (N, width) z + y + t b^T, written over z."""
    (n, width), rank = y.shape, b.size(1)
    out = torch.empty_like(y) if z is None else z
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(n, ROWS))
    ranks = (t.stride(0), rank, _padded(rank))
    _add[grid](y, t, b, out, out, n, width, *ranks, z is not None, (ROWS, COLUMNS))
    return out


@triton.jit
def _rms_norm(x, weight, y, scale, d, eps, size: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    x_ = tl.load(x + row * d + i, mask=i < d, other=0.0).to(tl.float32)
    s = 1 / tl.sqrt_rn(tl.sum(x_ * x_, 0) / d + eps)
    w = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
    tl.store(y + row * d + i, (x_ * s * w).to(y.dtype.element_ty), mask=i < d)
    tl.store(scale + row, s)


@triton.jit
def _rms_norm_backward(dy, x, weight, scale, residual, dx, d, size: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    s = tl.load(scale + row)
    unit = tl.load(x + row * d + i, mask=i < d, other=0.0).to(tl.float32) * s
    w = tl.load(weight + i, mask=i < d, other=0.0).to(tl.float32)
    g = tl.load(dy + row * d + i, mask=i < d, other=0.0).to(tl.float32) * w
    r = tl.load(residual + row * d + i, mask=i < d, other=0.0).to(tl.float32)
    out = r + s * (g - unit * (tl.sum(g * unit, 0) / d))
    tl.store(dx + row * d + i, out.to(dx.dtype.element_ty), mask=i < d)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x / rms(x) * weight of x (N, d), and 1 / rms(x) (N,) in float32."""
    y, scale = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    size = triton.next_power_of_2(x.size(1))
    _rms_norm[len(x),](x, weight, y, scale, x.size(1), eps, size, num_warps=_warps(size))
    return y, scale


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, residual: Tensor) -> Tensor:
    """Returns residual + the gradient of x, written over dy; all but weight (d,) and scale (N,) are (N, d)."""
    size = triton.next_power_of_2(x.size(1))
    _rms_norm_backward[len(x),](dy, x, weight, scale, residual, dy, x.size(1), size, num_warps=_warps(size))
    return dy


def _warps(size: int) -> int:
    return max(1, min(16, size // 512))


@triton.jit
def _swiglu(
    gate, up, y, tg, bg, tu, bu, n, width, y_row, t_row: tl.constexpr,
    rg: tl.constexpr, ru: tl.constexpr, RG: tl.constexpr, RU: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * tile[0] + tl.arange(0, tile[0])
    column = tl.program_id(0) * tile[1] + tl.arange(0, tile[1])
    at, mask = row[:, None] * y_row + column[None, :], (row < n)[:, None] & (column < width)[None, :]
    g = _updated(gate, tg, bg, row, column, n, width, t_row, rg, at, mask, RG)
    u = _updated(up, tu, bu, row, column, n, width, t_row, ru, at, mask, RU)
    at = row[:, None] * width + column[None, :]
    tl.store(y + at, (g * u / (1 + tl.exp(-g))).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    dy, gate, up, tg, bg, tu, bu, td, ad, n, width, y_row, t_row: tl.constexpr, d_row: tl.constexpr,
    rg: tl.constexpr, ru: tl.constexpr, rd: tl.constexpr,
    RG: tl.constexpr, RU: tl.constexpr, RD: tl.constexpr, few: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * tile[0] + tl.arange(0, tile[0])
    column = tl.program_id(0) * tile[1] + tl.arange(0, tile[1])
    at, mask = row[:, None] * y_row + column[None, :], (row < n)[:, None] & (column < width)[None, :]
    dense = row[:, None] * width + column[None, :]
    g = _updated(gate, tg, bg, row, column, n, width, t_row, rg, at, mask, RG, few, few)
    u = _updated(up, tu, bu, row, column, n, width, t_row, ru, at, mask, RU, few, few)
    d = _updated(dy, td, ad, row, column, n, width, d_row, rd, dense, mask, RD, True, few)
    s = 1 / (1 + tl.exp(-g))
    tl.store(gate + at, (d * u * s * (1 + g * (1 - s))).to(gate.dtype.element_ty), mask=mask)
    tl.store(up + at, (d * g * s).to(up.dtype.element_ty), mask=mask)
    tl.store(dy + dense, (g * s * u).to(dy.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor, updates: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """Returns silu(gate + t b^T) * (up + t b^T) of gate and up (N, F), each with an update (t (N, r), b (F, r)).

    The rows of gate and of up may lie apart in memory, at the same distance.
    """
    (n, width), (tg, bg), (tu, bu) = gate.shape, *updates
    y, ranks = gate.new_empty(n, width), [bg.size(1), bu.size(1)]
    grid = (triton.cdiv(width, COLUMNS), triton.cdiv(n, ROWS))
    strides = (gate.stride(0), tg.stride(0))
    _swiglu[grid](gate, up, y, tg, bg, tu, bu, n, width, *strides, *ranks, *map(_padded, ranks), (ROWS, COLUMNS))
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, updates: tuple[tuple[Tensor, Tensor], ...], below: tuple[Tensor, Tensor]
) -> None:
    """Writes the gradients of gate and up over them, and the output of `swiglu` over dy (N, F).

    The gradient of that output is dy + t a, where `below` is t (N, r) and a (r, F). Rows lie as for `swiglu`.
    """
    (n, width), (tg, bg), (tu, bu), (td, ad) = gate.shape, *updates, below
    ranks = [bg.size(1), bu.size(1), len(ad)]
    few = all(0 < rank <= FEW for rank in ranks)
    rows, columns, warps = FEW_TILE if few else (ROWS, COLUMNS, 4)
    bg, bu = (kernels.transposed(b) if few else b for b in (bg, bu))
    grid = (triton.cdiv(width, columns), triton.cdiv(n, rows))
    given = (dy, gate, up, tg, bg, tu, bu, td, ad, n, width, gate.stride(0), tg.stride(0), td.stride(0))
    _swiglu_backward[grid](*given, *ranks, *map(_padded, ranks), few, (rows, columns), num_warps=warps)


def _padded(rank: int) -> int:
    """Returns the size of a tile for a rank; 0 means no update."""
    return 0 if rank == 0 else max(SMALLEST, triton.next_power_of_2(rank))


@triton.jit
def _rotate(
    x, t, b, cos, sin, n, width, x_row, t_row: tl.constexpr, r: tl.constexpr, half, R: tl.constexpr, tile: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64) * tile[0] + tl.arange(0, tile[0])
    i = tl.arange(0, tile[1])
    column, fits = tl.program_id(0) * 2 * half + i, (row < n)[:, None] & (i < half)[None, :]
    at, angle = row[:, None] * x_row + column[None, :], row[:, None] * 2 * half + half + i[None, :]
    first = _updated(x, t, b, row, column, n, width, t_row, r, at, fits, R)
    second = _updated(x + half, t, b + half * r, row, column, n, width - half, t_row, r, at, fits, R)
    c = tl.load(cos + angle, mask=fits, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=fits, other=0.0).to(tl.float32)
    tl.store(x + at, (first * c - second * s).to(x.dtype.element_ty), mask=fits)
    tl.store(x + half + at, (second * c + first * s).to(x.dtype.element_ty), mask=fits)


def rotate(x: Tensor, update: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor) -> None:
    """Writes x + t b^T, rotated, over x (N, H * D); cos and sin (1, 1, N, D) are those of ops.rotate.

    The rows of x may lie apart in memory.
    """
    (n, width), (t, b), size = x.shape, update, cos.size(-1)
    tile = (ROWS, max(SMALLEST, triton.next_power_of_2(size // 2)))
    grid = (width // size, triton.cdiv(n, tile[0]))
    rank = b.size(1)
    _rotate[grid](x, t, b, cos, sin, n, width, x.stride(0), t.stride(0), rank, size // 2, _padded(rank), tile)


def rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, dx: Tensor) -> None:
    """Writes the gradient of the input of `rotate`, from that of its output, over dx; both are (N, H * D)."""
    dy, dx = (x.view(1, len(x), -1, cos.size(-1)).transpose(1, 2) for x in (dy, dx))
    kernels.rotate(dy, cos, sin, -1, dx)
