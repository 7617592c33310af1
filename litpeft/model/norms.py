"""The norms of a model. A weight that trains is float32 whatever x is."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.config import ModelConfig
from litpeft.model.kernels.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight; a weight that trains is float32 whatever x is."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class RMS(nn.Module):
    """x / rms(x)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), None, self.eps)


class RMSNorm1p(RMSNorm):
    """x / rms(x) * (1 + weight)"""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 has no number between 1 and 1.0078
        return rms_norm(x.to(wide), self.weight.to(wide) + 1, self.eps).to(x.dtype)


class GatedNorm(nn.Module):
    """The weight of a norm that stands beside a gate: the layer computes both."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / deviation(x) * weight + bias, if it has them; those that train are float32 whatever x is."""

    offset = 0

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else (self.weight + self.offset if self.offset else self.weight)
        weight, bias = (None if parameter is None else parameter.to(x.dtype) for parameter in (weight, self.bias))
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class LayerNorm1p(LayerNorm):
    """(x - mean(x)) / deviation(x) * (1 + weight) + bias"""

    offset = 1


class EachHead(LayerNorm):
    """The layer norm of each head (..., heads, D), with a weight of its own for each head."""

    def __init__(self, heads: int, size: int, eps: float):
        super().__init__(size, eps, bias=False)
        self.weight = nn.Parameter(torch.ones(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight.to(x.dtype)


class OwnNorms(nn.Module):
    """What EachHead computes, where the files hold a norm for each head."""

    def __init__(self, heads: int, size: int, eps: float):
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(size, eps, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.stack([norm.weight for norm in self.norms]).to(x.dtype)
        return F.layer_norm(x, x.shape[-1:], eps=self.norms[0].eps) * weight


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": RMSNorm,
    "rms_1p": RMSNorm1p,
    "layer": LayerNorm,
    "layer_1p": LayerNorm1p,
    "layer_no_bias": partial(LayerNorm, bias=False),
    "layer_plain": partial(LayerNorm, elementwise_affine=False),
}


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    """Returns a norm over so many numbers, by default the model's width."""
    return NORMS[config.norm](size or config.d_model, config.norm_eps)


def make_qk_norm(config: ModelConfig, heads: int, size: int) -> nn.Module | None:
    """Returns the norm of the queries or keys of so many heads of a size.

    `qk_norm` "all" is over all heads at once; "head" over each head, with one weight for all, and "rotated" as well,
    after the rotation; "each" over each head, with a weight for each, and "own" as well, by modules of their own.
    """
    if config.qk_norm == "own":
        return OwnNorms(heads, size, config.norm_eps)
    if config.qk_norm == "each":
        return EachHead(heads, size, config.norm_eps)
    sizes = {"head": size, "rotated": size, "all": heads * size}
    return None if config.qk_norm is None else make_norm(config, sizes[config.qk_norm])
