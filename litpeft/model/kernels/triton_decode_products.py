"""Products of a few tokens with some rows of a weight, which is read once: what the kernels of triton_decode.py share.

One token's products are sums, those of more tokens go through tensor cores. Both are in float32.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from litpeft.model.kernels.triton_decode_codes import coded_product, coded_product_of_one


class Weight(NamedTuple):
    """The tensors of a weight (out, in); in a kernel, pointers to them, one for each row that a program reads."""

    w: Tensor  # (out, in), or codes of four bits, two a byte
    absmax: Tensor | None = None  # of blocks of 64 codes: float32, or codes of a byte if there is a scale
    scale: Tensor | None = None  # of 256 blocks each
    offset: Tensor | None = None  # (1,), of all absmax


class Plan(NamedTuple):
    """How a kernel computes a product; constants when it is compiled."""

    tokens: int  # 1, or as many as a tensor core takes
    outputs: int  # of a program: rows of the weight, or pairs of rows where a kernel combines two
    inputs: int  # read at a time
    stages: int  # loads that are under way at once
    even: bool  # the weight's width is a multiple of `inputs`


@triton.jit
def _dense_product(x, norm, eps, w, rows, d, plan: tl.constexpr):
    """As `product`; w (M,) points to the rows of a weight (out, d)."""
    M: tl.constexpr = w.shape[0]
    R: tl.constexpr = plan.tokens
    K: tl.constexpr = plan.inputs
    x += tl.minimum(tl.arange(0, R), rows - 1)[:, None] * d
    squares, y = tl.zeros((1, K), tl.float32), tl.zeros((M, K) if R == 1 else (R, M), tl.float32)
    for start in tl.range(0, d, K, num_stages=plan.stages):
        k = start + tl.arange(0, K)[None, :]
        mask = None if plan.even else k < d
        other = None if plan.even else 0.0
        w_ = tl.load(w[:, None] + k, mask=mask, other=other)
        x_ = tl.load(x + k, mask=mask, other=other)
        if R == 1:
            x_ = x_.to(tl.float32)
            if norm is not None:
                squares += x_ * x_
                x_ *= tl.load(norm + k, mask=mask, other=other).to(tl.float32)
            y += x_ * w_.to(tl.float32)
        else:
            y = tl.dot(x_, tl.trans(w_), y, input_precision="ieee")
    if R == 1:
        y = tl.sum(y, 1)[None, :]
        if norm is not None:
            y *= 1 / tl.sqrt_rn(tl.sum(squares, 1)[:, None] / d + eps)
    return y


@triton.jit
def product(x, norm, eps, weight, row, tables, rows, d, plan: tl.constexpr, dtype: tl.constexpr):
    """Returns x W^T (plan.tokens, M) in float32, of x (rows, d) and the rows `row` (M,) of W.

    One token is normed here, if there is a norm (d,): the sum of its squares is known at the end only, so the norm's
    scale multiplies the result. `weight` holds a pointer for all rows, or one for each.
    """
    if weight.absmax is None:
        w = weight.w + row * d
        if plan.even:
            w = tl.multiple_of(w, 16)  # bytes
        y = _dense_product(x, norm, eps, w, rows, d, plan)
    elif plan.tokens == 1:
        y = coded_product_of_one(x, norm, eps, weight, row, tables, d, plan, dtype)
    else:
        y = coded_product(x, weight, row, tables, rows, d, plan)
    return y
