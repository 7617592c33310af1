"""Low-rank updates of layers that read the same x, as one step of autograd.

Letters: N rows, R the sum of the layers' ranks r.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.model.kernels import native
from litpeft.model.kernels.library import LAYERS, Library
from litpeft.model.kernels.ops import product

THICK = 64  # rank above which products by torch are faster than litpeft/model/kernels's


class Updates(torch.autograd.Function):
    """y + s B A x for each layer, written over its y.

    A is one matrix for all of them, and what a product and a sum do in three passes over y takes one, and one rounding.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scales: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        n, rows = len(scales), x.reshape(-1, x.size(-1))
        ys, as_, bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        ctx.ranks, ctx.scales, ctx.wide = [len(a) for a in as_], scales, as_[0].dtype
        a = (torch.cat(as_) if n > 1 else as_[0]).to(x.dtype)
        flat = [y.detach().view(-1, y.size(-1)) for y in ys]
        library = ctx.library = _library(ctx.ranks, rows, *flat)  # which scales B, not h: the backward pass has to know
        if library is not None:
            bs = [(s * b).to(x.dtype) for s, b in zip(scales, bs, strict=True)]
            h = library.low_rank(rows, a, bs, flat)
        else:
            bs = [b.to(x.dtype) for b in bs]
            h = _scaled(product(rows, a), ctx)  # (N, R)
            for y, part, b in zip(flat, h.split(ctx.ranks, 1), bs, strict=True):
                y.addmm_(part, b.T)
        trains_a, trains_b = (any(ctx.needs_input_grad[2 + i * n : 2 + (i + 1) * n]) for i in (1, 2))
        ctx.save_for_backward(x if trains_a else None, h if trains_b else None, a, *bs)
        return ys

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        n, (x, h, a, *bs) = len(dys), ctx.saved_tensors
        rows, x = [dy.reshape(-1, dy.size(-1)) for dy in dys], None if x is None else x.reshape(-1, x.size(-1))
        if ctx.library is not None:
            rows, bs = ([tensor.contiguous() for tensor in tensors] for tensors in (rows, [b.T for b in bs]))
            dx, da, dbs = ctx.library.low_rank_backward(rows, x, a, h, bs, ctx.needs_input_grad[0])
            dbs = dbs and [s * db.T for s, db in zip(ctx.scales, dbs, strict=True)]
        else:
            dx = da = dbs = None
            if ctx.needs_input_grad[0] or x is not None:
                dh = [product(dy, b.T) for dy, b in zip(rows, bs, strict=True)]
                dh = _scaled(torch.cat(dh, 1) if n > 1 else dh[0], ctx)
                dx, da = product(dh, a.T) if ctx.needs_input_grad[0] else None, None if x is None else dh.T @ x
            if h is not None:
                dbs = [dy.T @ part for dy, part in zip(rows, h.split(ctx.ranks, 1), strict=True)]
        das = [None] * n if da is None else da.to(ctx.wide).split(ctx.ranks)
        dbs = [None] * n if dbs is None else [db.to(ctx.wide) for db in dbs]
        return None if dx is None else dx.view(*dys[0].shape[:-1], -1), None, *dys, *das, *dbs


def _scaled(h: Tensor, ctx: torch.autograd.function.FunctionCtx) -> Tensor:
    """Multiplies each layer's part of h (N, R), in place, by its scale."""
    if len(set(ctx.scales)) == 1:
        return h.mul_(ctx.scales[0])
    for part, scale in zip(h.split(ctx.ranks, 1), ctx.scales, strict=True):
        part.mul_(scale)
    return h


def _library(ranks: Sequence[int], *tensors: Tensor) -> Library | None:
    """Returns litpeft/model/kernels if it takes these updates."""
    fits = len(ranks) <= LAYERS and all(rank % 2 == 0 and rank <= THICK for rank in ranks)
    return native(*tensors) if fits and all(x.is_contiguous() for x in tensors) else None
