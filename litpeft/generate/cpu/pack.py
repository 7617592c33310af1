"""The frozen weights of a model that only answers on a CPU, as its matrix products read them fastest.

Layers that read the same input become one matrix, so that a token takes 4 products in a block and not 7.
"""

import torch.nn as nn
from torch import Tensor

from litpeft.generate.cpu.native_weights import NativeRows
from litpeft.generate.cpu.packed_weights import FourBitRows, Int8Rows, PackedRows, Rows
from litpeft.model.context import Context
from litpeft.model.gpt import GPT, MLP, Attention, Block
from litpeft.model.quantize.four_bit import FP4, NF4
from litpeft.model.quantize.int8 import Int8
from litpeft.model.slots import Linear, TiedHead


class Packed(Linear):
    """A layer whose weight is in `rows`; of its own parameters only names, shapes and types are left."""

    def base(self, x: Tensor) -> Tensor:
        return self.rows.of(self, self.rows.product(x), -1)

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        alone = len(self.rows.layers) == 1 and self.rows.whole
        return self.rows.answer(x) if alone else super().forward(x, ctx)

    def dense(self) -> Tensor:
        return self.rows.of(self, self.rows.dense(), 0)


class PackedTiedHead(TiedHead):
    """A head with a packed copy of the embedding, from which it takes rows, not products."""

    def base(self, x: Tensor) -> Tensor:
        return self.rows.product(x)


KINDS = {Linear: PackedRows, TiedHead: PackedRows, Int8: Int8Rows, NF4: FourBitRows, FP4: FourBitRows}


def pack_weights(model: GPT, native: bool = True) -> None:
    """Packs, in place, every linear layer that a kind of rows takes, and whose weight no loaded delta has replaced.

    `native`: as litpeft/model/kernels multiplies them, where it can.
    """
    replaced = {leaf: owners(model, leaf) for leaf in ("weight", "bias")}

    def kind(layer: Linear) -> type[Rows] | None:
        owner = layer.embed[0] if type(layer) is TiedHead else layer
        if type(layer) not in KINDS or owner in replaced["weight"]:
            return None
        kinds = [NativeRows] if native and owner not in replaced["bias"] else []
        return next((kind for kind in (*kinds, KINDS[type(layer)]) if kind.takes(layer)), None)

    for group in [*(group for block in model.blocks for group in groups(block)), [model.head]]:
        alike = len({(kind(layer), type(layer)) for layer in group}) == 1
        for layers in [group] if alike else [[layer] for layer in group]:
            rows = kind(layers[0])
            if rows is not None:
                _pack(layers, rows)
            if model.files is not None:
                model.files.drop_pages()
    if any(parameter.is_meta for parameter in model.parameters()):
        for parameter in model.parameters():  # the rest moves out of the model's files, whose pages can go then
            if not parameter.is_meta:
                parameter.data = parameter.data.clone()


def owners(model: GPT, *leaves: str) -> set[nn.Module]:
    """Returns the modules of which a loaded delta has replaced one of the parameters of these names."""
    parts = (key.rpartition(".") for key in model.base_values)
    return {model.get_submodule(module) for module, _, leaf in parts if leaf in leaves}


def groups(block: Block) -> list[list[Linear]]:
    """Returns the linear layers of a block, those together that read the same input."""
    attn, mlp, known = block.attn, block.mlp, []
    if type(attn) is Attention:
        known += [[attn.q, attn.k, attn.v], [attn.o]]
    if type(mlp) is MLP:
        known += [[mlp.up] if mlp.gate is None else [mlp.gate, mlp.up], [mlp.down]]
    named = {layer for group in known for layer in group}
    return known + [[layer] for layer in block.modules() if isinstance(layer, Linear) and layer not in named]


def _pack(layers: list[Linear], kind: type[Rows]) -> None:
    rows = kind(layers)
    for layer in layers:
        layer.rows = rows
        if isinstance(layer, TiedHead):
            layer.__class__ = PackedTiedHead
            continue
        layer.__class__ = Packed
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name != "bias":
                setattr(layer, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
