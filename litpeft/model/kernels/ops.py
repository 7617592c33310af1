"""Operations of a block with backward passes of our own: fewer passes over memory, and less memory.

Autograd would keep every intermediate of these formulas; each function here keeps its inputs only.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.kernels import fused, native
from litpeft.model.recompute import again

CHUNK = 1 << 18  # numbers whose float32 copies fit a CPU's cache: norms are memory-bound
CAST_CHUNK = 1 << 20  # numbers of a weight that are cast at a time, for the same reason


def use_eager() -> bool:
    """Returns whether to leave a formula to torch: without autograd nothing is kept, and torch.compile fuses it."""
    return not torch.is_grad_enabled() or torch.compiler.is_compiling()


@cache
def has_onednn() -> bool:
    """Returns whether this build of torch gives access to oneDNN's products."""
    operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return operators and torch.backends.mkldnn.is_available()


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which a product with x is computed: that of x, unless autocast says otherwise."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns W x + b: (..., in) -> (..., out). A weight of another type is cast to that of x.

    Where that makes it larger and there is no autograd, it is cast a few outputs at a time. Float32 on a CPU goes to
    oneDNN: torch takes MKL there, which needed twice the time on an AMD processor.
    """
    if x.dtype != weight.dtype:
        in_parts = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if in_parts and x.dtype.itemsize > weight.dtype.itemsize:
            return _cast_in_parts(x, weight, bias)
        weight = again(Tensor.to, weight, x.dtype)
    float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not (x.is_cpu and float32 and x.dim() > 1 and x.numel()) or torch.compiler.is_compiling() or not has_onednn():
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if torch.is_grad_enabled() else _onednn(x, weight, bias)


def _cast_in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns W x + b without a copy of W in the type of x."""
    y, outputs = x.new_empty(*x.shape[:-1], len(weight)), max(1, CAST_CHUNK // weight.size(1))
    for part, some in zip(y.split(outputs, -1), weight.split(outputs), strict=True):
        part.copy_(product(x, some.to(x.dtype)))
    return y if bias is None else y.add_(bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_dx, needs_dweight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_dweight else None, weight if needs_dx else None)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, needs_dbias = dy.flatten(0, -2), ctx.needs_input_grad[2]
        dx = None if weight is None else _onednn(dy, weight.t())
        dweight = None if x is None else _onednn(rows.t(), x.flatten(0, -2).t())
        return dx, dweight, rows.sum(0) if needs_dbias else None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns x / rms(x) * weight for x (..., d) and weight (d,), in the type of x; computed in float32 or better."""
    if x.is_cuda or use_eager():  # torch's own gives the same bits
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    return _RMSNorm.apply(x, weight, eps)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields tensors of equal leading shape as chunks (rows, n) that fit the cache, the same rows of each."""
    rows = [x.flatten(0, -2) if x.dim() > 1 else x[None] for x in tensors]
    return zip(*(x.split(max(1, CHUNK // rows[0].size(1))) for x in rows), strict=True)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        library = native(x)
        if library is not None:
            x = x.contiguous()
            y, scale = library.norm(x, weight.to(wide), eps)
            ctx.save_for_backward(x, weight, scale)
            return y
        y, scale = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide)  # scale = 1 / rms(x)
        weight_ = weight.to(wide)
        for x_, y_, scale_ in _chunks(x, y, scale):
            size = torch.linalg.vector_norm(x_, dim=-1, keepdim=True, dtype=wide)
            scale_.copy_(size.square_().div_(x.size(-1)).add_(eps).rsqrt_())
            y_.copy_((x_.to(wide) * scale_).mul_(weight_))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        library = native(x, dy)
        if library is not None:
            needs_dweight = ctx.needs_input_grad[1]
            dx, dweight = library.norm_backward(dy.contiguous(), x, weight.to(scale.dtype), scale, needs_dweight)
            return dx, None if dweight is None else dweight.to(weight.dtype), None
        dx, weight_ = x.new_empty(x.shape), weight.to(scale.dtype)
        dweight = torch.zeros_like(weight_) if ctx.needs_input_grad[1] else None
        for x_, dy_, scale_, dx_ in _chunks(x, dy, scale, dx):
            unit, dy_ = x_.to(scale.dtype) * scale_, dy_.to(scale.dtype)
            if dweight is not None:
                dweight += (dy_ * unit).sum(0)
            dunit = dy_ * weight_
            along = (dunit * unit).mean(-1, keepdim=True)
            dx_.copy_(dunit.addcmul_(unit, along, value=-1).mul_(scale_))
        return dx, None if dweight is None else dweight.to(weight.dtype), None


def scaled(y: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Returns gain * y + shift for y (..., out) and vectors (out,), in the type of y."""
    if gain is None:
        return y if shift is None else y + shift.to(y.dtype)
    return _scaled(y, gain, shift) if use_eager() else _Scaled.apply(y, gain, shift)


def _scaled(y: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
    # gain - 1 times y is added to y, as bfloat16 has no number between 1 and 1.0078
    return torch.addcmul(y if shift is None else y + shift.to(y.dtype), y, (gain - 1).to(y.dtype))


class _Scaled(torch.autograd.Function):
    """One pass over dy for each gradient, where autograd makes two and a sum."""

    @staticmethod
    def forward(ctx, y: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, gain)
        return _scaled(y, gain, shift)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y, gain), (needs_dy, _, needs_dshift) = ctx.saved_tensors, ctx.needs_input_grad
        dgain = None if y is None else sum((y_ * dy_).sum(0, dtype=gain.dtype) for y_, dy_ in _chunks(y, dy))
        dshift = dy.flatten(0, -2).sum(0, dtype=gain.dtype) if needs_dshift else None
        return _scaled(dy, gain, None) if needs_dy else None, dgain, dshift


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns silu(gate) * up, of https://arxiv.org/abs/2002.05202."""
    return _swiglu(gate, up) if use_eager() else _SwiGLU.apply(gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    library = fused(gate, up)
    return F.silu(gate).mul_(up) if library is None else library.swiglu(gate.contiguous(), up.contiguous())


class _SwiGLU(torch.autograd.Function):
    """Keeps its inputs only: the backward pass recomputes silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        library = fused(dy, gate, up)
        if library is not None:
            return library.swiglu_backward(dy.contiguous(), gate.contiguous(), up.contiguous())
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns x (B, heads, T, D) with each pair (i, i + R/2) rotated by its angle.

    cos and sin are (B, 1, T, R), each angle twice; sin is negated in its first half.
    """
    return _turn(x, cos, sin, 1) if use_eager() else _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        return _turn(dy, *ctx.saved_tensors, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Returns x rotated forwards (1) or back (-1)."""
    library = fused(x, cos, sin) if len(x) == 1 else None
    if library is not None:
        return library.rotate(x, cos, sin, direction)
    rotary_dim = cos.size(-1)
    if rotary_dim < x.size(-1):
        x, rest = x.split((rotary_dim, x.size(-1) - rotary_dim), -1)
        return torch.cat((_turn(x, cos, sin, direction), rest), -1)
    return torch.addcmul(x * cos, x.roll(rotary_dim // 2, -1), sin, value=direction)
