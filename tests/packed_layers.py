"""Layers with packed weights for the tests of storages."""

import torch

from litpeft.generate.cpu.pack import KINDS
from litpeft.model.quantize import DOUBLE, STORAGES, storage_class
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.slots import Linear

KEYS = [(name, double) for name in STORAGES for double in (False, True)[: 1 + (name in DOUBLE)]]
FAST = [
    (name, double) for name, double in KEYS if KINDS.get(storage_class(name))
]  # that torch or bitsandbytes multiply


def make(name: str, double: bool, weight: torch.Tensor, dtype=torch.float32, bias: bool = False) -> Quantized:
    """Returns a layer that holds this weight (out, in)."""
    with torch.device("meta"):
        layer = Linear(weight.size(1), weight.size(0))
    layer.__class__ = storage_class(name)
    layer.convert(dtype, double)
    for key, tensor in layer.pack(weight).items():
        assert (tensor.shape, tensor.dtype) == (getattr(layer, key).shape, getattr(layer, key).dtype)
        setattr(layer, key, torch.nn.Parameter(tensor, requires_grad=False))
    if bias:
        layer.bias = torch.nn.Parameter(torch.randn(weight.size(0)))
    return layer
