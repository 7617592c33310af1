"""Folding deltas into the weights of the plain model that computes the same."""

from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.slots import Bank, Delta, Embedding, Linear, Slot, TiedHead


def unfoldable(model: nn.Module) -> str | None:
    """Returns the class name of a Delta that cannot be folded into weights, or None if the model can be folded.

    Reads no tensor: one rank may call it alone.
    """
    inside = {layer.slot for layer in model.modules() if isinstance(layer, Linear | Embedding)}
    for slot in model.modules():
        for delta in slot.deltas.values() if isinstance(slot, Slot) else ():
            if not delta.vanishes and (slot not in inside or type(delta).affine is Delta.affine):
                return type(delta).__name__
    return None


def widened(tensor: Tensor) -> Tensor:
    """Returns a copy in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def folds(
    module: nn.Module, widened: Callable[[Tensor], Tensor] = widened, prefix: str = ""
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yields name, tensor and former tensor of the plain model that computes the same without deltas.

    A weight is folded in the copy that `widened` makes of it, in float32 or better. The former tensor is the same
    object where nothing is folded, and None for a bias that a method adds. Raises TypeError, with the Delta's name, if
    one cannot be folded.
    """
    if not prefix and unfoldable(module):
        raise TypeError(f"{unfoldable(module)} acts on activations: nothing can be merged")
    if isinstance(module, Linear | Embedding):
        weight, bias = before = module.dense(), module.bias
        if module.slot.deltas and not isinstance(module, TiedHead):
            wide = widened(weight)
            weight, bias = module.slot.frozen(module).fold(wide, None if bias is None else bias.to(wide.dtype))
        if not isinstance(module, TiedHead):
            yield f"{prefix}weight", weight, before[0]
        if bias is not None:
            yield f"{prefix}bias", bias, before[1]
    elif not isinstance(module, Slot | Bank):
        yield from ((prefix + name, p, p) for name, p in module.named_parameters(recurse=False))
        yield from ((prefix + name, b, b) for name, b in module.named_buffers(recurse=False))
        for name, child in module.named_children():
            yield from folds(child, widened, f"{prefix}{name}.")
