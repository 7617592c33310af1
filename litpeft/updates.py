"""Low-rank updates of layers that read the same x, as one step of autograd.

Letters: N rows, R the sum of the layers' ranks r.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from litpeft.native import native
from litpeft.native.library import LAYERS, Library
from litpeft.ops import product

THICK = 64  # rank above which products by torch are faster than litpeft/native's


class Updates(torch.autograd.Function):
    """y + s B A x for each layer, written over its y.

    A is one matrix for all of them, and what a product and a sum do in three passes over y takes one, and one rounding.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scales: Sequence[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        n, rows = len(scales), x.reshape(-1, x.size(-1))
        ys, as_, bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        ctx.ranks, ctx.scales = [len(a) for a in as_], scales
        a, flat = torch.cat(as_).to(x.dtype), [y.detach().view(-1, y.size(-1)) for y in ys]
        scaled = [(s * b).to(x.dtype) for s, b in zip(scales, bs, strict=True)]
        library = _library(ctx.ranks, rows, *flat)
        if library is not None:
            h = library.low_rank(rows, a, scaled, flat)
        else:
            h = product(rows, a)  # (N, R)
            for y, part, b in zip(flat, h.split(ctx.ranks, 1), scaled, strict=True):
                y.addmm_(part, b.T)
        trains_a, trains_b = (any(ctx.needs_input_grad[2 + i * n : 2 + (i + 1) * n]) for i in (1, 2))
        ctx.save_for_backward(x if trains_a else None, h if trains_b else None, *as_, *bs)
        return ys

    @staticmethod
    def backward(ctx, *dys: Tensor) -> tuple[Tensor | None, ...]:
        n, (x, h, *tensors) = len(dys), ctx.saved_tensors
        rows, x = [dy.reshape(-1, dy.size(-1)) for dy in dys], None if x is None else x.reshape(-1, x.size(-1))
        a = torch.cat(tensors[:n]).to(rows[0].dtype)
        scaled = [(s * b).T.to(a.dtype).contiguous() for s, b in zip(ctx.scales, tensors[n:], strict=True)]
        library = _library(ctx.ranks, a, *rows)
        gradients = _gradients if library is None else library.low_rank_backward
        dx, da, dbs = gradients(rows, x, a, h, scaled, ctx.needs_input_grad[0])
        wide = tensors[0].dtype
        das = [None] * n if da is None else da.to(wide).split(ctx.ranks)
        dbs = [None if dbs is None else (s * dbs[i]).T.to(wide) for i, s in enumerate(ctx.scales)]
        return None if dx is None else dx.view(*dys[0].shape[:-1], -1), None, *dys, *das, *dbs


def _library(ranks: Sequence[int], *tensors: Tensor) -> Library | None:
    """Returns litpeft/native if it takes these updates."""
    fits = len(ranks) <= LAYERS and all(rank % 2 == 0 and rank <= THICK for rank in ranks)
    return native(*tensors) if fits and all(x.is_contiguous() for x in tensors) else None


def _gradients(
    dys: Sequence[Tensor], x: Tensor | None, a: Tensor, h: Tensor | None, bs: Sequence[Tensor], wants_dx: bool
) -> tuple[Tensor | None, Tensor | None, list[Tensor] | None]:
    """What Library.low_rank_backward returns."""
    dx = da = dbs = None
    if wants_dx or x is not None:
        dh = torch.cat([product(dy, b) for dy, b in zip(dys, bs, strict=True)], 1)
        dx, da = product(dh, a.T) if wants_dx else None, None if x is None else dh.T @ x
    if h is not None:
        dbs = [part.T @ dy for dy, part in zip(dys, h.split([len(b) for b in bs], 1), strict=True)]
    return dx, da, dbs
