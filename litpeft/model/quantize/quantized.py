"""A linear layer with a quantised frozen weight, and how a model gets such layers."""

from collections.abc import Callable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from litpeft.model.affine import Affine
from litpeft.model.gpt import GPT
from litpeft.model.kernels.ops import product, product_dtype
from litpeft.model.quantize import storage_class
from litpeft.model.slots import Linear


class Product(torch.autograd.Function):
    """y = W x + b, where W is unpacked in the forward pass, again in the backward pass, and not kept between them."""

    @staticmethod
    def forward(
        ctx, x: Tensor, bias: Tensor | None, storage: type["Quantized"], shape: tuple, *packed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*packed)
        ctx.storage, ctx.shape, ctx.dtype = storage, shape, x.dtype
        return product(x, storage.unpack(packed, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        packed = ctx.saved_tensors  # checkpointing allows reading them only once
        if ctx.needs_input_grad[0]:
            dx = product(dy, ctx.storage.unpack(packed, ctx.shape, ctx.dtype).t())
        if ctx.needs_input_grad[1]:
            dbias = dy.reshape(-1, dy.size(-1)).sum(0)
        return dx, dbias, None, None, *(None for _ in packed)


class Quantized(Linear):
    """A linear layer with a packed weight. A subclass says how a weight is packed and unpacked.

    All packed tensors are ordinary parameters that do not train: FSDP shards them, state dicts and files hold them.
    """

    stacks = ()
    dtype: torch.dtype  # of `dense`
    double_quantize: bool
    packed_names: tuple[str, ...]  # of the parameters that hold the weight

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Returns the weight (out, in) of packed tensors."""
        raise NotImplementedError(f"{cls.__name__} must say how its weight is unpacked")

    def layout(self) -> dict[str, Tensor]:
        """Returns the packed tensors' shapes and types by name, on the meta device."""
        raise NotImplementedError(f"{type(self).__name__} must say what it holds")

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """Returns the packed tensors of a weight (out, in) by name, on its device; does not store them."""
        raise NotImplementedError(f"{type(self).__name__} must say how a weight is packed")

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        """Returns why one does not train with this storage on a device; None if one does."""
        return None

    def folded(self, affine: Affine) -> dict[str, Tensor] | None:
        """Returns the packed tensors of the weight with an affine map folded into it, its codes as they are.

        Constants are in float32 or better. None: the codes would have to change. The map's shift is the bias's matter.
        """
        return None

    def convert(self, dtype: torch.dtype, double_quantize: bool) -> None:
        """Turns a Linear on the meta device into this storage, without a weight yet."""
        self.dtype, self.double_quantize = dtype, double_quantize
        layout = self.layout()
        self.packed_names = tuple(layout)
        for name, tensor in layout.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def packed(self) -> dict[str, Tensor]:
        """Returns the packed tensors that the layer holds, by name."""
        return {name: getattr(self, name) for name in self.packed_names}

    def reset_parameters(self) -> None:
        """No-op: a packed weight comes from a file."""

    def unpacked(self, packed: dict[str, Tensor]) -> Tensor:
        tensors = tuple(packed[name] for name in self.packed_names)
        return self.unpack(tensors, (self.out_features, self.in_features), self.dtype)

    def dense(self) -> Tensor:
        return self.unpacked(self.packed())

    def base(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(x))  # as F.linear does under autocast
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if x.dtype.itemsize > self.dtype.itemsize and not torch.is_grad_enabled():
            return product(x, self.dense(), bias)  # unpacked in the run's type, not in the wider one of x
        return Product.apply(x, bias, type(self), (self.out_features, self.in_features), *self.packed().values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """As `nn.Module`, except that `model.to(bfloat16)` and the like keep the types of packed tensors."""
        packed = {id(tensor) for tensor in self.packed().values()}

        def keep_type(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in packed and moved.dtype != tensor.dtype else moved

        return super()._apply(keep_type, recurse)


def empty_layer(layer: Linear, name: str, double_quantize: bool, dtype: torch.dtype) -> Quantized:
    """Returns a layer of the size of another in this storage, without a weight, on the meta device."""
    with torch.device("meta"):
        empty = storage_class(name)(layer.in_features, layer.out_features)
    empty.convert(dtype, double_quantize)
    return empty


def store(
    model: GPT, name: str, double_quantize: bool, dtype: torch.dtype, others: Mapping[str, str] | None = None
) -> dict[str, Quantized]:
    """Turns every linear layer of the blocks into this storage, in place, and returns them by name.

    The model must be on the meta device, without a method yet: weights are packed one by one as they are read. Head,
    embedding and norms stay as they are. `double_quantize` quantises a storage's absmax, too, if it has one per block.
    `others` names the storage of layers that have another.
    """
    layers = {f"blocks.{key}": layer for key, layer in model.blocks.named_modules() if type(layer) is Linear}
    for key, layer in layers.items():
        assert layer.weight.is_meta, f"{key} has its weight already"
        layer.__class__ = storage_class((others or {}).get(key, name))
        layer.convert(dtype, double_quantize)
    return layers
