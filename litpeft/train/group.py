"""Linear layers that read the same x as one layer with all their outputs, and their low-rank updates.

One product of a GPU with the weights of several layers is faster than several: forward it reads x once, backward the
gradient of x is summed in one product; together 5 % fewer milliseconds for Llama-3.1-8B on an H200.
Letters: N tokens, r rank, R sum of the ranks, out_i of one layer, out of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litpeft.model.slots import Linear, is_empty

ALIGNED = 8  # numbers of two bytes at which a tensor begins, so that products and kernels read 16 bytes at a time
THICK = 64  # rank above which an update is better two products of its own


def as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """Returns tensors as their concatenation, without a copy, or None if they do not lie one after the other."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
    for tensor in tensors:
        alike = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        if not alike or tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage:
            return None
        end += tensor.nbytes
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


@dataclass
class Group:
    """Layers that read the same x, and the factors A (r, in) and B (out_i, r) of their updates: all A, then all B."""

    layers: Sequence[Linear]
    factors: list[Tensor | None]

    @classmethod
    def of(cls, *layers: Linear) -> "Group | None":
        """Returns the group, or None if a layer trains, or its slot does something else than a low-rank update."""
        pairs: list[tuple[Tensor | None, Tensor | None]] = []
        for layer in layers:
            pair = (None, None) if is_empty(layer.slot) else layer.slot.factors()
            trains = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
            if trains or pair is None or (pair[0] is not None and len(pair[0]) > THICK):
                return None
            pairs.append(pair)
        return cls(layers, [a for a, _ in pairs] + [b for _, b in pairs])

    def lay_together(self) -> None:
        """Moves the layers' weights, so that they lie one after the other; the layers hold views of them."""
        if len(self.layers) == 1 or len({type(layer) for layer in self.layers}) > 1:
            return
        for name in self.layers[0].stacks:
            parameters = [getattr(layer, name) for layer in self.layers]
            joined = torch.cat([parameter.data for parameter in parameters])
            for parameter, part in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
                parameter.data = part

    @property
    def sizes(self) -> list[int]:
        return [layer.out_features for layer in self.layers]

    @cached_property
    def stacked(self) -> tuple[Tensor, ...]:
        """Returns the tensors that hold the weights of all layers as those of one, or none if there are no such."""
        first = self.layers[0]
        if any(type(layer) is not type(first) for layer in self.layers):
            return ()
        found = tuple(as_one([getattr(layer, name) for layer in self.layers]) for name in first.stacks)
        return () if None in found else found

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weights of all layers (out, in) in `dtype`."""
        first = self.layers[0]
        if len(self.layers) == 1:
            return first.dense().to(dtype)
        if type(first) is Linear and self.stacked:
            return self.stacked[0].to(dtype)
        joined = torch.empty(sum(self.sizes), first.in_features, dtype=dtype, device=first.weight.device)
        for layer, part in zip(self.layers, joined.split(self.sizes), strict=True):
            layer.write_dense(part)
        return joined

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Returns the biases of all layers (out,), or None if there are none."""
        given = [layer.bias for layer in self.layers]
        if all(bias is None for bias in given):
            return None
        zeros = (torch.zeros(size, device=self.layers[0].weight.device) for size in self.sizes)
        return joined([(z if b is None else b).to(dtype) for b, z in zip(given, zeros, strict=True)], 0)

    def product(self, x: Tensor) -> Tensor:
        """Returns W x + b of all layers (N, out)."""
        bias, y = self.bias(x.dtype), self.own_product(x)
        if y is None:
            return F.linear(x, self.weight(x.dtype), bias)
        return y if bias is None else y.add_(bias)

    def own_product(self, x: Tensor, back: bool = False) -> Tensor | None:
        """Returns what `Linear.multiply` makes of x, if it does something."""
        return self.layers[0].multiply(x, self.stacked, back) if self.stacked else None

    def product_back(self, dy: Tensor) -> Tensor:
        """Returns W^T dy (N, in) of dy (N, out)."""
        product = self.own_product(dy, back=True)
        return dy @ self.weight(dy.dtype) if product is None else product

    def cast(self, dtype: torch.dtype, factors: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor]]:
        """Returns A of all layers (R, in) and B (out_i, r) of each, in the products' type; r is 0 for no update."""
        as_, bs = factors[: len(self.layers)], factors[len(self.layers) :]
        first, device = self.layers[0], self.layers[0].weight.device
        given = [a for a in as_ if a is not None]
        given = given or [torch.empty(0, first.in_features, dtype=dtype, device=device)]
        empty = (torch.empty(size, 0, dtype=dtype, device=device) for size in self.sizes)
        a = as_one(given)
        a = torch.cat(given) if a is None else a
        return a.to(dtype), [e if b is None else b.to(dtype) for b, e in zip(bs, empty, strict=True)]

    def gradients(self, da: Tensor, dbs: Sequence[Tensor], types: Sequence[torch.dtype | None]) -> list[Tensor | None]:
        """Returns the gradients in the order of the factors and in their types; None where there is no update."""
        das = da.split([db.size(1) for db in dbs])
        return [None if t is None else d.to(t) for d, t in zip([*das, *dbs], types, strict=True)]

    def thin(self, dy: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Returns the gradients of t (N, R) and of each B, of the updates t b^T, from that of the outputs (N, out)."""
        dys = dy.split(self.sizes, 1)
        dt = joined([d @ b for d, (_, b) in zip(dys, parts, strict=True)], 1)
        return dt, [d.T @ t for d, (t, _) in zip(dys, parts, strict=True)]

    def spread(self, dt: Tensor, a: Tensor, dy: Tensor) -> Tensor:
        """Returns the gradient (N, in) of x, from that of t (N, R) and of the outputs (N, out)."""
        product = self.own_product(dy, back=True)
        if product is not None:
            return product.addmm_(dt, a) if len(a) else product
        weight = self.weight(dy.dtype)
        return (dt @ a).addmm_(dy, weight) if len(a) else dy @ weight  # the product adds as it is written


class _Cast(torch.autograd.Function):
    """Copies of tensors in another type, one after the other in memory, by few kernels for all of them."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.types = [tensor.dtype for tensor in tensors]
        return tuple(_Cast.copies(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        return None, *_Cast.copies(gradients, ctx.types[0])

    @staticmethod
    def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        sizes = [-(-tensor.numel() // ALIGNED) * ALIGNED for tensor in tensors]
        parts = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device).split(sizes)
        parts = [part[: tensor.numel()].view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(parts, list(tensors))
        return parts


def cast_together(groups: Sequence[Group], dtype: torch.dtype) -> None:
    """Replaces the factors of groups by their copies in `dtype`: a kernel for each would take longer than its copy."""
    factors = [factor for group in groups for factor in group.factors if factor is not None]
    if len({factor.dtype for factor in factors}) != 1:
        return  # each group casts its own
    copies = iter(_Cast.apply(dtype, *factors))
    for group in groups:
        group.factors = [None if factor is None else next(copies) for factor in group.factors]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def parts_of(t: Tensor, bs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Returns for each layer its columns of t (N, R), beside its B."""
    return list(zip(t.split([b.size(1) for b in bs], 1), bs, strict=True))
