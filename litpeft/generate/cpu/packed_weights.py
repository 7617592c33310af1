"""Frozen weights of layers that read the same input, in the layouts that torch and bitsandbytes read fastest.

Weights are in oneDNN's own layout: in the layout of a file, the product with one row reads memory at half its speed.
Codes are multiplied as they are, and never unpacked for a few rows.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.generate.cpu.merged import merged
from litpeft.model.affine import Affine
from litpeft.model.by_row import runs_of
from litpeft.model.kernels.low_rank import apply_affines
from litpeft.model.kernels.ops import has_onednn, product
from litpeft.model.quantize.codes import BLOCK, CODES, has_kernels
from litpeft.model.quantize.four_bit import FP4, NF4, FourBit
from litpeft.model.quantize.int8 import Int8
from litpeft.model.slots import OFF, Linear

LONG = 1024  # inputs above which oneDNN sums a single row in another order than a row among others
OUTPUTS = 32  # whose codes bitsandbytes' kernel takes at a time


def can_pack(dtype: torch.dtype) -> bool:
    """Returns whether this build of torch and this processor have oneDNN's products in a type."""
    native = dtype == torch.float32 or (dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported())
    return native and has_onednn()


class PackedLinears:
    """The weights of layers that read the same input, stacked as one matrix."""

    def __init__(self, layers: Sequence[Linear]):
        self.layers, self.sizes = layers, [layer.out_features for layer in layers]
        self.biased = layers[0].bias is not None
        self.slot = next((layer.slot for layer in layers if layer.slot.deltas), None)  # the first that is filled
        self.deltas = None if self.slot is None else self.slot.deltas
        self.runs = runs_of(layers)  # of which a row has one, or none
        parts = [layer.slot.frozen(layer) for layer in layers] if self.slot else []
        are_affine = bool(parts) and None not in parts
        plain = merged(layers, parts) if are_affine else None
        self.merged = type(self)(plain) if plain else None  # what answers with deltas, if there is one
        self.affine = Affine.concatenate(parts, self.sizes) if are_affine and not plain else None

    @staticmethod
    def takes(layer: Linear) -> bool:
        """Returns whether a layer can be packed so."""
        raise NotImplementedError("a subclass must say what it takes")

    @classmethod
    def joins(cls, layers: Sequence[Linear]) -> bool:
        """Returns whether layers, each of which it takes, can be one matrix."""
        return len({type(layer) for layer in layers}) == 1

    def product(self, x: Tensor) -> Tensor:
        """Returns W x + b of all layers, one after the other: (..., in) -> (..., sum of sizes)."""
        raise NotImplementedError(f"{type(self).__name__} must say how it multiplies")

    def answer(self, x: Tensor) -> Tensor:
        """Returns the outputs of all layers, with their deltas; valid if `covers_deltas`."""
        if self.slot is None or self.slot.deltas is OFF:
            return self.product(x)
        return apply_affines([self.product(x)], x, [self.affine])[0] if self.merged is None else self.merged.product(x)

    @property
    def covers_deltas(self) -> bool:
        """Returns whether `answer` is what the layers compute now: all deltas are off, or all on and affine maps."""
        if self.slot is None or self.slot.deltas is OFF:
            return True
        return (self.affine or self.merged) is not None and self.slot.deltas is self.deltas

    def dense(self) -> Tensor:
        """Returns the weights (sum of sizes, in), in the type that they were packed from."""
        raise NotImplementedError(f"{type(self).__name__} must say what its weights are")

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Returns the layers' biases (sum of sizes,); read each time, as `without_delta` may replace them."""
        return torch.cat([layer.bias for layer in self.layers]).to(dtype) if self.biased else None

    def with_bias(self, y: Tensor) -> Tensor:
        """Returns y + b for y (..., sum of sizes)."""
        return y + self.bias(y.dtype) if self.biased else y

    def unpacked_product(self, x: Tensor) -> Tensor:
        """Returns W x + b with the weights unpacked, in the type of x."""
        return product(x, self.dense().to(x.dtype), self.bias(x.dtype))

    def part_of(self, layer: Linear, y: Tensor, dim: int) -> Tensor:
        """Returns the part of y that belongs to one of the layers."""
        return y if len(self.layers) == 1 else y.split(self.sizes, dim)[self.layers.index(layer)]


class OneDNNLinears(PackedLinears):
    """The same numbers in bfloat16 or float32, in oneDNN's layout."""

    def __init__(self, layers: Sequence[Linear]):
        super().__init__(layers)
        weights = [layer.dense().detach() for layer in layers]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    @staticmethod
    def takes(layer: Linear) -> bool:
        return can_pack(layer.dense().dtype)

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return self.unpacked_product(x)
        multiply, bias = torch.ops.mkldnn._linear_pointwise.default, self.bias(x.dtype)
        if x.numel() == x.size(-1) > LONG and x.dtype == torch.bfloat16:
            return multiply(torch.cat((x, x)), self.weight, bias, "none", [], "")[: len(x)]
        return multiply(x, self.weight, bias, "none", [], "")

    def dense(self) -> Tensor:
        return self.weight.to_dense()


class Int8Linears(PackedLinears):
    """As INT8 codes, with scales in bfloat16."""

    def __init__(self, layers: Sequence[Int8]):
        super().__init__(layers)
        self.codes = torch.cat([layer.weight.detach() for layer in layers])
        self.absmax = torch.cat([layer.absmax.detach() for layer in layers])
        self.scale = (self.absmax / 127).bfloat16()

    @staticmethod
    def takes(layer: Int8) -> bool:
        return layer.dtype == torch.bfloat16

    def product(self, x: Tensor) -> Tensor:
        if not Int8.small_batch(x, self.codes):
            return self.unpacked_product(x)
        return self.with_bias(Int8.product(x, self.codes, self.scale))

    def dense(self) -> Tensor:
        return Int8.unpack((self.codes, self.absmax), self.codes.shape, torch.bfloat16)


class FourBitLinears(PackedLinears):
    """As codes of four bits, in the layout of bitsandbytes' kernel for CPUs, and absmax rounded to bfloat16.

    Two inputs of OUTPUTS outputs are 64 codes in 32 bytes: the first half of the outputs is in the bytes' low halves.
    """

    def __init__(self, layers: Sequence[FourBit]):
        super().__init__(layers)
        size, self.kind = layers[0].in_features, layers[0].kind
        codes = torch.cat([layer.weight.detach() for layer in layers])
        low, high = codes.view(-1, 2, OUTPUTS // 2, size // 2).unbind(1)
        pair = torch.stack((low >> 4 | high & 240, low & 15 | high << 4), -1).view(torch.int16)[..., 0]
        self.codes = pair.transpose(1, 2).contiguous().view(torch.uint8).view(-1, size // 2)
        absmax = torch.cat([layer.blocks().detach() for layer in layers]).view(-1, size // BLOCK)
        self.absmax = absmax.t().to(torch.bfloat16, memory_format=torch.contiguous_format)
        self.table = torch.tensor(CODES[self.kind])

    @staticmethod
    def takes(layer: FourBit) -> bool:
        fits = layer.in_features % BLOCK == 0 and layer.out_features % OUTPUTS == 0
        return layer.dtype == torch.bfloat16 and fits and _has_product(layer.kind)

    def product(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            return self.unpacked_product(x)
        shape = (len(self.codes), x.size(-1))
        return self.with_bias(torch.ops.bitsandbytes.gemv_4bit(x, self.codes, shape, self.absmax, self.table, BLOCK))

    def dense(self) -> Tensor:
        byte = self.codes.view(-1, self.codes.size(1), OUTPUTS)
        code = torch.stack((byte & 15, byte >> 4), 2).view(*byte.shape, 2).transpose(1, 2).reshape(-1, BLOCK)
        weight = self.table[code.int()] * self.absmax.float().t().reshape(-1, 1)
        return weight.view(len(self.codes), -1).bfloat16()


@cache
def _has_product(kind: str) -> bool:
    """Returns whether this version of bitsandbytes multiplies with FourBitLinears' layout on this processor."""
    if not has_kernels("cpu") or not torch._C._dispatch_has_kernel_for_dispatch_key("bitsandbytes::gemv_4bit", "CPU"):
        return False
    layer = Linear(2 * BLOCK, 2 * OUTPUTS)
    weight, layer.__class__ = layer.weight.detach(), FP4 if kind == FP4.kind else NF4
    layer.convert(torch.bfloat16, False)
    for name, tensor in layer.pack(weight).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    packed, x = FourBitLinears([layer]), torch.eye(2 * BLOCK, dtype=torch.bfloat16)
    return torch.allclose(packed.product(x), packed.dense().t(), rtol=2**-7)
