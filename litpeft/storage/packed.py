"""The frozen weights of a model that only answers, in the layout that a CPU's matrix library reads fastest.

oneDNN multiplies one row with a bfloat16 weight as it lies in a file at half the speed at which memory can be read, and
with its own layout of the same numbers at all of it. They are exactly the same numbers: `dense` gives them back.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model import GPT
from litpeft.slots import Linear, TiedHead

LONG = 1024  # inputs above which oneDNN sums a row by itself in another order than a row among others


def can_pack() -> bool:
    """Returns whether this build of torch and this processor have oneDNN's products in bfloat16."""
    operators = all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return operators and torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()


def product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Returns W x + b for x (..., in), and as F.linear for a type that the weight was not packed for."""
    bias = None if bias is None else bias.to(x.dtype)
    if x.dtype != packed.dtype:
        return F.linear(x, packed.to_dense().to(x.dtype), bias)
    if x.numel() == x.size(-1) > LONG:
        return torch.ops.mkldnn._linear_pointwise(torch.cat((x, x)), packed, bias, "none", [], "")[: len(x)]
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


class Packed(Linear):
    """A linear layer whose weight is packed."""

    def base(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        return self.weight.to_dense()


class PackedTiedHead(TiedHead):
    """A head with a packed copy of the embedding, from which it takes rows, not products."""

    packed: Tensor

    def base(self, x: Tensor) -> Tensor:
        return product(x, self.packed, None)


def pack(model: GPT) -> None:
    """Packs, in place, every linear layer in bfloat16 that is neither quantised nor replaced by a loaded delta."""
    for name, layer in list(model.named_modules()):
        if type(layer) not in (Linear, TiedHead) or layer.dense().dtype != torch.bfloat16:
            continue
        owner = "embed" if isinstance(layer, TiedHead) else name
        if f"{owner}.weight" in model.base_values:
            continue
        if isinstance(layer, TiedHead):
            layer.packed = _packed(layer.dense())
            layer.__class__ = PackedTiedHead
        else:
            layer.weight = nn.Parameter(_packed(layer.weight), requires_grad=False)
            layer.__class__ = Packed


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 1)
