"""Cross-entropy straight from hidden states, so that the logits of all positions are never held."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from litpeft.model.kernels import fused
from litpeft.model.kernels.ops import product, product_dtype
from litpeft.model.slots import Linear, is_empty

CHUNK = 256  # positions whose logits exist at one time
GPU_CHUNK = 512  # on a GPU, where each chunk reads the head from memory: 9 % faster than 256, for an 8B on an H200
SOFTMAX_CHUNK = 1 << 21  # logits whose softmax a CPU computes at once: their float32 copy fits its cache
Objective = Callable[[Tensor], Tensor]  # from the losses (N,) of all targets to what is minimised; differentiable


def chunk(device: torch.device) -> int:
    """Returns the positions whose logits exist at one time."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


def finished(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """Returns logits as the model gives them: multiplied by `scale`, then l becomes cap * tanh(l / cap)."""
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def summed_cross_entropy(
    head: Linear,
    x: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    cap: float | None = None,
    weights: Tensor | None = None,
    objective: Objective | None = None,
) -> Tensor:
    """Returns the sum over N positions of -log p(target), in float32 or better; x is (N, d), targets (N,).

    On a GPU a position with target -1 does not count. With `weights` (N,) each is multiplied by its own. With an
    `objective` its value is returned instead of the sum. `scale` and `cap` are those of `finished`.
    """
    dtype = product_dtype(x)
    # in float16 small probabilities, which are the gradient, would underflow; autograd computes them from a scaled loss
    if len(targets) and is_empty(head.slot) and head.bias is None and cap is None and dtype != torch.float16:
        x, weight = x if scale == 1 else x * scale, head.dense()
        weight = weight if torch.is_grad_enabled() else weight.detach()  # else its gradient is computed all the same
        if objective is not None:
            return _Judged.apply(x, weight, targets, dtype, objective)
        return _Summed.apply(x, weight, targets, dtype, weights)
    found, size = [], chunk(x.device)
    for start in range(0, max(1, len(targets)), size):  # without targets one pass: a zero whose gradient is zeros
        part = slice(start, start + size)
        given = head, x[part], targets[part], scale, cap, None if weights is None else weights[part]
        given = (*given, objective is None)
        if torch.is_grad_enabled():
            random = not is_empty(head.slot)  # as dropout is; the state of a GPU's generator cannot be recorded
            found.append(checkpoint(_plain, *given, use_reentrant=False, preserve_rng_state=random))
        else:
            found.append(_plain(*given))
    return objective(torch.cat(found)) if objective is not None else sum(found[1:], found[0])


def _plain(
    head: Linear, x: Tensor, targets: Tensor, scale: float, cap: float | None, weights: Tensor | None, summed: bool
) -> Tensor:
    """Returns the losses (N,), or their sum, for any head."""
    logits = finished(head(x), scale, cap)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if weights is None:
        return F.cross_entropy(wide, targets, ignore_index=-1, reduction="sum" if summed else "none")
    return F.cross_entropy(wide, targets, ignore_index=-1, reduction="none").mul(weights.to(wide.dtype)).sum()


class _Summed(torch.autograd.Function):
    """The loss of a head that is one product. The forward pass computes the gradient, too, while it has the logits.

    So no logits are kept, and none are recomputed. Their gradient is p, less 1 at the target. Weights of the positions
    multiply what is computed from a row of it: its gradient by x, or x itself.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, weights: Tensor | None = None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if ctx.needs_input_grad[1] else None
        weight, rows = weight.to(dtype), x.to(dtype)
        factors = None if weights is None else weights.to(wide)[:, None]  # (N, 1)
        size = chunk(x.device)
        for start in range(0, len(targets), size):
            at = slice(start, start + size)
            part, factor = rows[at], None if factors is None else factors[at]
            logits = product(part, weight)
            losses = _losses(logits, targets[at], wide, any(ctx.needs_input_grad))
            total += (losses if factor is None else losses * factor[:, 0]).sum()
            if dx is not None:
                own = product(logits, weight.t())
                dx[at] = own if factor is None else own * factor
            if dweight is not None:
                dweight += logits.T @ (part if factor is None else (part * factor).to(dtype))
        ctx.save_for_backward(dx, dweight)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (*(d if d is None else d * scale for d in (dx, dweight)), None, None, None)


class _Judged(torch.autograd.Function):
    """The value of an objective of all losses, for the same head. No logits are kept either.

    The gradient by a position's logits is p, less 1 at the target, times a factor that is known only once all losses
    are: it multiplies the gradient by x at the end. For a head that trains the logits are computed a second time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, objective: Objective) -> Tensor:
        ctx.set_materialize_grads(False)
        wide, size = torch.promote_types(dtype, torch.float32), chunk(x.device)
        wants_dx, wants_dweight = ctx.needs_input_grad[:2]
        dx, dweight = torch.empty_like(x) if wants_dx else None, None
        losses = torch.empty(len(targets), dtype=wide, device=x.device)
        weight, rows = weight.to(dtype), x.to(dtype)
        parts = [slice(start, start + size) for start in range(0, len(targets), size)]
        for at in parts:
            logits = product(rows[at], weight)
            losses[at] = _losses(logits, targets[at], wide, wants_dx)
            if dx is not None:
                dx[at] = product(logits, weight.t())
        if not (wants_dx or wants_dweight):
            return objective(losses)
        with torch.enable_grad():
            value = objective(losses.requires_grad_())
        factors = torch.autograd.grad(value, losses)[0][:, None]  # (N, 1)
        if wants_dweight:
            dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
        for at in parts:
            if dx is not None:
                dx[at] *= factors[at]
            if dweight is not None:
                logits = product(rows[at], weight)
                _losses(logits, targets[at], wide, True)
                dweight += logits.T @ (rows[at] * factors[at]).to(dtype)
        ctx.save_for_backward(dx, dweight)
        return value.detach()

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        return (*(d if d is None else d * scale for d in (dx, dweight)), None, None, None)


def _losses(logits: Tensor, targets: Tensor, wide: torch.dtype, wants_gradient: bool) -> Tensor:
    """Returns the losses (N,); if the gradient is wanted, it is written over the logits (N, V)."""
    library = fused(logits)
    if library is not None:
        return library.cross_entropy(logits, targets.contiguous())
    losses = logits.new_empty(len(logits), dtype=wide)
    size = len(logits) if logits.is_cuda else max(1, SOFTMAX_CHUNK // logits.size(1))
    for start in range(0, len(logits), size):
        at = slice(start, start + size)
        piece, target = logits[at], targets[at]
        log_p = F.log_softmax(piece, -1, dtype=wide)
        losses[at] = -log_p.gather(1, target[:, None])[:, 0]
        if wants_gradient:
            piece.copy_(log_p.exp_().scatter_add_(1, target[:, None], log_p.new_full((len(target), 1), -1)))
    return losses
