"""The places where a finetuning method may act. Each is the identity until a method fills it."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.kernels.ops import product


class Slot(nn.Module):
    """An empty place: returns its first argument and owns no parameters."""

    def forward(self, y: Tensor, *context: object) -> Tensor:
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias


class Delta(nn.Module):
    """What a method puts into a slot. It owns its new tensors; no Delta holds another Delta.

    In `Linear.slot` it gets y = W x + b of its own, and may write over it.
    `reset_parameters` (the name that Fabric and FSDP call) must not look at other modules: what depends on the base
    weights goes to `Method.init`. Tensors of another module are reached through the module: FSDP swaps them.
    """

    def reset_parameters(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must initialise its tensors")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns the weight (out, in) and bias (out,) that compute the same without this Delta, if there are such.

        What it is given is the caller's copy, in float32 or better, and may be changed in place.
        """
        raise NotImplementedError  # a Delta that leaves it so acts on activations, and cannot be merged

    @classmethod
    def beside(cls, ys: Sequence[Tensor], x: Tensor, layers: Sequence["Linear"]) -> list[Tensor]:
        """Returns what the slots of layers that read the same x, each with a Delta of this class, make of their ys."""
        return [layer.after(y, x) for layer, y in zip(layers, ys, strict=True)]

    @classmethod
    def below(cls, layers: Sequence["Linear"]) -> "Delta | None":
        """Returns one Delta that does at once what the slots of layers with the same input do, if there is such a one.

        It is for answers: its tensors are copies. Each layer has a Delta of this class, or an empty slot.
        """

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns A (rank, in) and B (out, rank), differentiably, if all that this Delta does is to add B A x."""


def product_dtype(x: Tensor) -> torch.dtype:
    """Returns the type in which a product with x is computed: that of x, unless autocast says otherwise."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class Bank(nn.ParameterDict):
    """Tensors shared by many deltas."""


class Rows(Protocol):
    """The weights of layers that read the same input, as one matrix."""

    layers: Sequence["Linear"]
    sizes: list[int]  # outputs of each layer

    def product(self, x: Tensor) -> Tensor:
        """Returns W x + b of all layers, one after the other: (..., in) -> (..., sum of sizes)."""

    def answer(self, x: Tensor) -> Tensor:
        """Returns what all layers make of x, with their slots."""


class Linear(nn.Linear):
    """y = slot(W x + b). A storage class (a quantised weight) overrides `base` and `dense` only."""

    rows: Rows | None = None  # set by generate/cpu/pack.py; the layers of a group have the same ones

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias)
        self.slot = Slot()

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where torch would load its compiler to draw numbers that nobody keeps
            super().reset_parameters()

    def base(self, x: Tensor) -> Tensor:
        """Returns W x + b of the frozen base: (..., in) -> (..., out)."""
        # what trains is float32 whatever x is; for the rest this casts nothing
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return product(x, self.weight.to(x.dtype), bias)

    def dense(self) -> Tensor:
        """Returns the weight (out, in) that `base` multiplies with."""
        return self.weight

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns what the slot makes of y = W x + b."""
        return y if type(self.slot) is Slot else self.slot(y, x, self)  # to ask an empty one takes as long as to write

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.base(x), x)


def together(x: Tensor, *layers: Linear) -> list[Tensor]:
    """Returns what each layer makes of x; by one product if their weights are one matrix."""
    rows = layers[0].rows
    if rows is None or rows is not layers[-1].rows:
        kind = type(layers[0].slot)
        if kind is Slot or any(type(layer.slot) is not kind for layer in layers):
            return [layer(x) for layer in layers]
        return kind.beside([layer.base(x) for layer in layers], x, layers)
    parts = rows.product(x).split_with_sizes(rows.sizes, -1)
    return [layer.after(y, x) for layer, y in zip(layers, parts, strict=True)]


class Embedding(nn.Embedding):
    """A row of the weight for each token."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class TiedHead(Linear):
    """The output head of a model whose embedding is its head: one parameter, owned by the embedding."""

    def __init__(self, embed: nn.Embedding):
        nn.Module.__init__(self)
        self.in_features, self.out_features = embed.embedding_dim, embed.num_embeddings
        self.embed = (embed,)  # a tuple hides the module, so that the weight is registered once
        self.register_parameter("bias", None)
        self.slot = Slot()

    def base(self, x: Tensor) -> Tensor:
        return product(x, self.dense().to(x.dtype))

    def dense(self) -> Tensor:
        return self.embed[0].weight
