"""Packs the frozen weights of a model that only answers on a CPU, in the layout that its products read fastest.

Layers that read the same input become one matrix, so that a token takes 4 products in a block and not 7.
"""

import torch.nn as nn
from torch import Tensor

from litpeft.generate.cpu.native_weights import NativeLinears
from litpeft.generate.cpu.packed_weights import FourBitLinears, Int8Linears, OneDNNLinears, PackedLinears
from litpeft.model.context import Context
from litpeft.model.gpt import GPT, MLP, Block
from litpeft.model.multi_head import Attention
from litpeft.model.quantize.few_bits import NF2, NF3
from litpeft.model.quantize.four_bit import FP4, NF4
from litpeft.model.quantize.fp8 import FP8
from litpeft.model.quantize.grouped import Int2, Int3, Int4
from litpeft.model.quantize.int8 import Int8
from litpeft.model.slots import Linear, TiedHead


class Packed(Linear):
    """A layer whose weight is in `packed_in`; its own parameters are on the meta device."""

    def base(self, x: Tensor) -> Tensor:
        return self.packed_in.part_of(self, self.packed_in.product(x), -1)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        alone = len(self.packed_in.layers) == 1 and self.packed_in.covers_deltas
        return self.packed_in.answer(x) if alone else super().forward(x, ctx)

    def dense(self) -> Tensor:
        return self.packed_in.part_of(self, self.packed_in.dense(), 0)


class PackedTiedHead(TiedHead):
    """A head with a packed copy of the embedding's weight; the embedding itself does lookups and keeps its own."""

    def base(self, x: Tensor) -> Tensor:
        return self.packed_in.product(x)


KINDS = {
    **{Linear: OneDNNLinears, TiedHead: OneDNNLinears, Int8: Int8Linears, NF4: FourBitLinears, FP4: FourBitLinears},
    FP8: OneDNNLinears,  # unpacked: no kernel for CPUs multiplies with its codes
    **dict.fromkeys((NF3, NF2, Int4, Int3, Int2), None),  # only in the C++ kernels' layout
}


def pack_weights(model: GPT, native: bool = True) -> None:
    """Packs, in place, every linear layer that a PackedLinears takes, unless a loaded delta has replaced its weight.

    `native`: in the layout of the C++ kernels, where possible.
    """
    replaced = {leaf: owners(model, leaf) for leaf in ("weight", "bias")}

    def kind(layer: Linear) -> type[PackedLinears] | None:
        owner = layer.embed[0] if type(layer) is TiedHead else layer
        if type(layer) not in KINDS or owner in replaced["weight"]:
            return None
        kinds = NativeLinears if native and owner not in replaced["bias"] else None, KINDS[type(layer)]
        return next((kind for kind in kinds if kind is not None and kind.takes(layer)), None)

    for group in [*(group for block in model.blocks for group in groups(block)), [model.head]]:
        kinds = {kind(layer) for layer in group}
        alike = len(kinds) == 1 and None not in kinds and kinds.pop().joins(group)
        for layers in [group] if alike else [[layer] for layer in group]:
            packed_class = kind(layers[0])
            if packed_class is not None:
                _pack(layers, packed_class)
            if model.files is not None:
                model.files.drop_pages()
    if any(parameter.is_meta for parameter in model.parameters()):
        for parameter in model.parameters():  # copy the rest out of the files, so that all their pages can be dropped
            if not parameter.is_meta:
                parameter.data = parameter.data.clone()


def owners(model: GPT, *leaves: str) -> set[nn.Module]:
    """Returns the modules of which a loaded delta has replaced a parameter with one of these names."""
    parts = (key.rpartition(".") for key in model.base_values)
    return {model.get_submodule(module) for module, _, leaf in parts if leaf in leaves}


def groups(block: Block) -> list[list[Linear]]:
    """Returns the linear layers of a block, grouped by the input that they read."""
    known = [group for part in block.modules() if type(part) in (Attention, MLP) for group in part.inputs()]
    named = {layer for group in known for layer in group}
    return known + [[layer] for layer in block.modules() if isinstance(layer, Linear) and layer not in named]


def _pack(layers: list[Linear], kind: type[PackedLinears]) -> None:
    packed = kind(layers)
    for layer in layers:
        layer.packed_in = packed
        if isinstance(layer, TiedHead):
            layer.__class__ = PackedTiedHead
            continue
        layer.__class__ = Packed
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name != "bias":
                setattr(layer, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
