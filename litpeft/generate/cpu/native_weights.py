"""Frozen weights of layers that read the same input, in the layout of the C++ kernels.

16 outputs make a strip, which is read from one end to the other: inputs 0 and 1 of each output, then 2 and 3 of each.
With eight bits a strip holds the even input of all outputs and then the odd one; with four bits a byte holds inputs k
(low half) and k + 2. Codes of fewer bits are held as if they had four.
"""

from collections.abc import Sequence
from ctypes import Array, addressof
from functools import cached_property

import torch
from torch import Tensor

from litpeft.generate.cpu.packed_weights import PackedLinears
from litpeft.model.affine import Affine
from litpeft.model.by_row import maps_of
from litpeft.model.kernels import library
from litpeft.model.kernels.library import AffineStruct, PackedLinearsStruct
from litpeft.model.quantize.codes import BLOCK, code_table
from litpeft.model.quantize.four_bit import FourBit
from litpeft.model.quantize.grouped import GROUP, Grouped
from litpeft.model.quantize.int8 import Int8
from litpeft.model.quantize.quantized import Quantized
from litpeft.model.slots import OFF, Linear

STRIP = 16  # outputs
KINDS = {torch.bfloat16: 0, torch.int8: 1, torch.uint8: 2}  # of products.h


class NativeLinears(PackedLinears):
    """In bfloat16, or as codes of eight or four bits with scales, and shifts, in float32."""

    def __init__(self, layers: Sequence[Linear]):
        super().__init__(layers)
        first = layers[0]
        self.inputs, self.span = first.in_features, first.in_features
        self.scale = self.shift = self.values = None
        self.affines: list[Array[AffineStruct]] = []
        if isinstance(first, Int8):
            self.scale = torch.cat([layer.absmax.detach() for layer in layers])[None] / 127
        elif isinstance(first, FourBit):
            absmax = torch.cat([layer.blocks().detach() for layer in layers])
            self.scale = absmax.view(-1, self.inputs // BLOCK).t().contiguous()
            tables = [code_table(layer.kind, torch.device("cpu")) for layer in layers]
            self.values, self.span = self._tables(tables), BLOCK
        elif isinstance(first, Grouped):
            self.scale, self.shift = (
                torch.cat([getattr(layer, name).detach().float() for layer in layers]).t().contiguous()
                for name in ("scale", "shift")
            )
            self.values, self.span = self._tables([torch.arange(16)] * len(layers)), GROUP
        self.codes = None if self.values is None else self.values.bfloat16()  # the kernels multiply with them rounded
        self.weight = _joined([_strips(layer) for layer in layers])
        if self.merged is not None and torch.equal(self.weight, self.merged.weight):
            self.merged.weight = self.weight
        maps = [maps_of(layers, run) for run in range(1, 1 + self.runs)] or [self.affine or Affine()]
        self.kept = [self._tensors(one) for one in (Affine(), *maps)]

    @cached_property  # not before: `share` may put another tensor in the weight's place
    def base(self) -> PackedLinearsStruct:
        return self._struct(self.kept[:1])

    @cached_property
    def tuned(self) -> PackedLinearsStruct:
        return self._struct(self.kept[1:]) if self.merged is None else self.merged.base

    def of_runs(self, number: int) -> PackedLinearsStruct:
        """Returns the layers with the affine maps of the base and of `number` runs, which `put` changes."""
        return self._struct(self.kept if self.runs else self.kept[:1] * (1 + number))

    def put(self, run: int) -> None:
        """Takes over what is in a run's place now."""
        self.kept[run] = self._tensors(maps_of(self.layers, run))
        for affines in self.affines:
            if len(affines) > run:
                affines[run] = _affine_struct(self.kept[run])

    @staticmethod
    def takes(layer: Linear) -> bool:
        coded = isinstance(layer, Quantized)
        multiple = BLOCK if isinstance(layer, FourBit) else GROUP
        fits = layer.in_features % multiple == 0 and layer.out_features % STRIP == 0
        return (layer.dtype if coded else layer.dense().dtype) == torch.bfloat16 and fits and library() is not None

    @classmethod
    def joins(cls, layers: Sequence[Linear]) -> bool:
        kinds = (all(isinstance(layer, kind) for layer in layers) for kind in (FourBit, Grouped))
        return super().joins(layers) or any(kinds)

    def _tables(self, values: list[Tensor]) -> Tensor:
        """Returns what the codes of each strip stand for (strips, 32), given the 16 values of each layer's."""
        rows = [table.float().repeat(size // STRIP, 2) for table, size in zip(values, self.sizes, strict=True)]
        return torch.cat(rows)

    def _tensors(self, affine: Affine) -> list[Tensor | None]:
        """Returns the tensors of AffineStruct, with the layers' biases."""
        affine = affine.after(Affine(shift=super().bias(torch.float32)))
        tensors = affine.gain, affine.shift, affine.A, None if affine.B is None else affine.B.t()
        return [None if tensor is None else tensor.float().contiguous() for tensor in tensors]

    def _struct(self, maps: list[list[Tensor | None]]) -> PackedLinearsStruct:
        affines = (AffineStruct * len(maps))(*map(_affine_struct, maps))
        self.affines.append(affines)  # the struct has no more than their address
        held = _pointers((self.weight, self.scale, self.shift, self.codes))
        kind, outputs = KINDS[self.weight.dtype], sum(self.sizes)
        return PackedLinearsStruct(*held, addressof(affines), kind, self.inputs, outputs, self.span)

    def product(self, x: Tensor) -> Tensor:
        return library().product(self.base, x) if x.dtype == torch.bfloat16 else self.unpacked_product(x)

    def answer(self, x: Tensor) -> Tensor:
        on = self.slot is not None and self.slot.deltas is not OFF
        return library().product(self.tuned, x) if on and x.dtype == torch.bfloat16 else super().answer(x)

    def dense(self) -> Tensor:
        outputs = sum(self.sizes)
        weight = self.weight.view(outputs // STRIP, -1)
        if weight.dtype == torch.bfloat16:
            return weight.view(-1, self.inputs // 2, STRIP, 2).transpose(1, 2).reshape(outputs, -1)
        if weight.dtype == torch.int8:
            codes = weight.view(-1, self.inputs // 2, 2, STRIP).permute(0, 3, 1, 2).reshape(outputs, -1)
            return (codes * self.scale.t()).bfloat16()
        pairs = weight.view(-1, self.inputs // 4, STRIP, 2).transpose(1, 2)
        codes = torch.stack((pairs & 15, pairs >> 4), 3).reshape(outputs, -1)
        values = self.values.repeat_interleave(STRIP, 0).gather(1, codes.long())
        dense = values.view(outputs, -1, self.span) * self.scale.t()[..., None]
        return (dense if self.shift is None else dense + self.shift.t()[..., None]).bfloat16().view(outputs, -1)


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _affine_struct(tensors: Sequence[Tensor | None]) -> AffineStruct:
    a = tensors[2]
    return AffineStruct(*_pointers(tensors), 0 if a is None else len(a))


def _joined(parts: list[Tensor]) -> Tensor:
    """Returns the parts stacked, each copied once."""
    sizes = [len(part) for part in parts]
    joined = parts[0].new_empty(sum(sizes), *parts[0].shape[1:])
    for place, part in zip(joined.split(sizes), parts, strict=True):
        place.copy_(part)
    return joined


def _strips(layer: Linear) -> Tensor:
    """Returns the weight or the codes of a layer in strips, (out / 16, ...); a view where possible."""
    inputs, strips = layer.in_features, layer.out_features // STRIP
    if isinstance(layer, Int8):
        return layer.weight.detach().view(strips, STRIP, inputs // 2, 2).permute(0, 2, 3, 1)
    if isinstance(layer, FourBit | Grouped):
        codes = layer.codes().view(strips, STRIP, inputs // 4, 4)
        return (codes[..., :2] | codes[..., 2:] << 4).transpose(1, 2)
    return layer.dense().detach().view(strips, STRIP, inputs // 2, 2).transpose(1, 2)
