"""Adds deltas to the weights of linear layers, for answers.

Weights in codes take them if no code changes; plain weights if multiplying with the update by itself would be slow."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.affine import Affine
from litpeft.model.fold import widened
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.slots import Linear

WIDE = 4  # updates with more than a quarter of the weights' numbers take as long as another product with the weights


def merged(layers: Sequence[Linear], affines: Sequence[Affine]) -> list[Linear] | None:
    """Returns layers without deltas that compute what these do with theirs; None if the deltas are to stay beside them.

    Codes stay as they are. Weights without codes are rounded to their type: `litpeft merge` does the same.
    """
    pairs = list(zip(layers, affines, strict=True))
    if not isinstance(layers[0], Quantized):
        return [_dense(*pair) for pair in pairs] if _is_wide(pairs) else None
    packed = [layer.folded(affine) for layer, affine in pairs]
    return None if None in packed else [_coded(*pair, one) for pair, one in zip(pairs, packed, strict=True)]


def _is_wide(pairs: Sequence[tuple[Linear, Affine]]) -> bool:
    """Returns whether low-rank updates have nearly as many numbers as the weights, or more."""
    rows = [(0 if affine.A is None else len(affine.A), layer) for layer, affine in pairs]
    numbers = sum(rank * (layer.in_features + layer.out_features) for rank, layer in rows)
    return WIDE * numbers > sum(layer.in_features * layer.out_features for layer, _ in pairs)


def _dense(layer: Linear, affine: Affine) -> Linear:
    weight = layer.dense().detach()
    wide, bias = affine.fold(widened(weight), _float(layer.bias))
    with torch.device("meta"):
        plain = Linear(layer.in_features, layer.out_features)
    return _filled(plain, {"weight": wide.to(weight.dtype), "bias": bias})


def _coded(layer: Quantized, affine: Affine, packed: dict[str, Tensor]) -> Quantized:
    _, bias = Affine(affine.gain, shift=affine.shift).fold(torch.empty(layer.out_features, 0), _float(layer.bias))
    with torch.device("meta"):
        plain = type(layer)(layer.in_features, layer.out_features)
    plain.convert(layer.dtype, layer.double_quantize)
    return _filled(plain, packed | {"bias": bias})


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


def _filled(layer: Linear, tensors: dict[str, Tensor | None]) -> Linear:
    for name, tensor in tensors.items():
        setattr(layer, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
    return layer
