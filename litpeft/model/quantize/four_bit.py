"""NF4 and FP4: four bits a weight, and a scale for every 64 of them.

    W = code[q] * absmax        absmax = dynamic[c] * absmax_scale + absmax_offset with double quantisation

Costs 4 + 32/64 = 4.5 bits a weight, with double quantisation 4 + 8/64 + 32/(64 * 256) = 4.127.
QLoRA https://arxiv.org/abs/2305.14314. The bytes are those of bitsandbytes.
"""

import torch
from torch import Tensor

from litpeft.model.kernels.ops import product_dtype
from litpeft.model.quantize.codes import (
    BLOCK,
    GROUP,
    absmax_in_torch,
    dequantize_4bit,
    fill_4bit,
    has_product,
    product_4bit,
    quantize_4bit,
    quantize_absmax,
)
from litpeft.model.quantize.quantized import Quantized


class FourBit(Quantized):
    """Weights as one of 16 codes times the largest magnitude of their block."""

    kind: str  # key of codes.CODES

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax, scale, offset = packed if len(packed) == 4 else (*packed, None, None)
        return dequantize_4bit(codes, absmax, scale, offset, shape, cls.kind, dtype)

    def write_dense(self, out: Tensor) -> None:
        fill_4bit(out, tuple(self.packed().values()), self.kind)

    def base(self, x: Tensor) -> Tensor:
        x = x.to(product_dtype(x))
        if torch.is_grad_enabled() or self.in_features % BLOCK or not has_product(x):
            return super().base(x)
        return product_4bit(x, tuple(self.packed().values()), self.out_features, self.kind, self.bias)

    def blocks(self) -> Tensor:
        """Returns the float32 absmax (ceil(out * in / 64),) of the weight's blocks."""
        if not self.double_quantize:
            return self.absmax
        return absmax_in_torch(self.absmax, self.absmax_scale, self.absmax_offset)

    def codes(self) -> Tensor:
        """Returns the code of each weight (out, in), from 0 to 15."""
        pairs = torch.stack((self.weight >> 4, self.weight & 15), 1).flatten()
        return pairs[: self.in_features * self.out_features].view(self.out_features, self.in_features)

    def layout(self) -> dict[str, Tensor]:
        n = self.in_features * self.out_features
        blocks = -(-n // BLOCK)
        sizes = {"weight": ((n + 1) // 2, torch.uint8), "absmax": (blocks, torch.float32)}
        if self.double_quantize:
            sizes["absmax"] = (blocks, torch.uint8)
            sizes["absmax_scale"] = (-(-blocks // GROUP), torch.float32)
            sizes["absmax_offset"] = (1, torch.float32)  # not a scalar: FSDP cannot shard those
        return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in sizes.items()}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        packed = quantize_4bit(weight, self.kind)
        if self.double_quantize:
            packed = packed[0], *quantize_absmax(packed[1])
        return dict(zip(self.packed_names, packed, strict=True))


class NF4(FourBit):
    """Codes at the quantiles of a normal distribution, which trained weights resemble."""

    kind = "nf4"


class FP4(FourBit):
    """Codes that are 4-bit floating point numbers."""

    kind = "fp4"
