"""Low-rank updates of layers that read the same x, as one function of autograd.

Letters: N rows, R the sum of the layers' ranks r.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from litpeft.model.affine import Affine
from litpeft.model.kernels import native
from litpeft.model.kernels.library import LAYERS, Library
from litpeft.model.kernels.ops import product, scaled, use_eager
from litpeft.model.recompute import again

SMALL_BATCH = 32  # rows up to which a CPU computes thin products faster in float32 than in half precision
THICK = 64  # rank above which torch's products are faster than the C++ kernel

Factors = tuple[Tensor, Tensor]  # A (r, in), and B (out, r) with the scale of the update in it


def apply_affines(ys: Sequence[Tensor], x: Tensor, affines: Sequence[Affine]) -> list[Tensor]:
    """Returns gain * y + B A x + shift for the y (..., out) of each of the layers, which read the same x (..., in)."""
    ys = [again(scaled, y, affine.gain, affine.shift) for y, affine in zip(ys, affines, strict=True)]
    low_rank = [n for n, affine in enumerate(affines) if affine.A is not None]
    if low_rank:
        updated = add_updates([ys[n] for n in low_rank], x, [(affines[n].A, affines[n].B) for n in low_rank])
        for n, y in zip(low_rank, updated, strict=True):
            ys[n] = y
    return ys


def add_updates(ys: Sequence[Tensor], x: Tensor, factors: Sequence[Factors]) -> list[Tensor]:
    """Returns y + B A x for the y (..., out) of each of the layers, which read the same x (..., in).

    Under autograd the result is written over y.
    """
    answers = not torch.is_grad_enabled() and x.device.type == "cpu"
    if answers and x.numel() <= SMALL_BATCH * x.size(-1):
        return [(y + product(product(x.to(a.dtype), a), b)).to(y.dtype) for y, (a, b) in zip(ys, factors, strict=True)]
    x = x.to(ys[0].dtype)
    if use_eager():
        return [y + product(product(x, a.to(x.dtype)), b.to(x.dtype)) for y, (a, b) in zip(ys, factors, strict=True)]
    as_, bs = zip(*factors, strict=True)
    return list(Updates.apply(x, *ys, *as_, *bs))


class Updates(torch.autograd.Function):
    """y + B A x for each layer, written over its y; the A of all layers are one matrix.

    A product and a sum would take three passes over y; this takes one, and rounds once.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        n, rows = len(tensors) // 3, x.reshape(-1, x.size(-1))
        ys, as_, bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        ctx.ranks, ctx.wide = [len(a) for a in as_], as_[0].dtype
        a, bs = (torch.cat(as_) if n > 1 else as_[0]).to(x.dtype), [b.to(x.dtype) for b in bs]
        flat = [y.detach().view(-1, y.size(-1)) for y in ys]
        library = ctx.library = _library(ctx.ranks, rows, *flat)
        if library is not None:
            h = library.low_rank(rows, a, bs, flat)
            for y in flat:
                increment_version(y)  # as torch's own functions do that write over a tensor
        else:
            h = product(rows, a)  # (N, R)
            for y, part, b in zip(flat, h.split(ctx.ranks, 1), bs, strict=True):
                y.addmm_(part, b.T)
        trains_a, trains_b = (any(ctx.needs_input_grad[1 + i * n : 1 + (i + 1) * n]) for i in (1, 2))
        ctx.save_for_backward(x if trains_a else None, h if trains_b else None, a, *bs)
        return ys

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        n, (x, h, a, *bs) = len(dys), ctx.saved_tensors
        rows, x = [dy.reshape(-1, dy.size(-1)) for dy in dys], None if x is None else x.reshape(-1, x.size(-1))
        if ctx.library is not None:
            rows, bs = ([tensor.contiguous() for tensor in tensors] for tensors in (rows, [b.T for b in bs]))
            dx, da, dbs = ctx.library.low_rank_backward(rows, x, a, h, bs, ctx.needs_input_grad[0])
            dbs = dbs and [db.T for db in dbs]
        else:
            dx = da = dbs = None
            if ctx.needs_input_grad[0] or x is not None:
                dh = [product(dy, b.T) for dy, b in zip(rows, bs, strict=True)]
                dh = torch.cat(dh, 1) if n > 1 else dh[0]
                dx, da = product(dh, a.T) if ctx.needs_input_grad[0] else None, None if x is None else dh.T @ x
            if h is not None:
                dbs = [dy.T @ part for dy, part in zip(rows, h.split(ctx.ranks, 1), strict=True)]
        das = [None] * n if da is None else da.to(ctx.wide).split(ctx.ranks)
        dbs = [None] * n if dbs is None else [db.to(ctx.wide) for db in dbs]
        return None if dx is None else dx.view(*dys[0].shape[:-1], dx.size(-1)), *dys, *das, *dbs


def _library(ranks: Sequence[int], *tensors: Tensor) -> Library | None:
    """Returns the C++ library if it takes these updates."""
    fits = len(ranks) <= LAYERS and all(rank % 2 == 0 and rank <= THICK for rank in ranks)
    return native(*tensors) if fits and all(x.is_contiguous() for x in tensors) else None
