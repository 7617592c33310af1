"""NF3 and NF2: the codes of NF4 for three and two bits a weight, and a scale for every 64 of them.

    W = code[q] * absmax        absmax as in four_bit.py

Costs bits + 32/64 bits a weight, with double quantisation bits + 0.127. LQ-LoRA https://arxiv.org/abs/2311.12023.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.quantize.bits import pack_bits, unpack_bits
from litpeft.model.quantize.four_bit import FourBit
from litpeft.model.quantize.quantized import Quantized


class FewBits(FourBit):
    """Weights as one of 8 or 4 codes times the largest magnitude of their block."""

    bits: int

    def codes(self) -> Tensor:
        n = self.in_features * self.out_features
        return unpack_bits(self.weight, self.bits)[:n].view(self.out_features, self.in_features)

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        code = unpack_bits(packed[0], cls.bits)[: (shape[0] * shape[1] + 1) // 2 * 2]
        return super().unpack((code[::2] << 4 | code[1::2], *packed[1:]), shape, dtype)

    def base(self, x: Tensor) -> Tensor:
        return Quantized.base(self, x)  # no kernel multiplies with these codes

    def write_dense(self, out: Tensor) -> None:
        Quantized.write_dense(self, out)  # nor unpacks them

    def layout(self) -> dict[str, Tensor]:
        layout, n = super().layout(), self.in_features * self.out_features
        return layout | {"weight": torch.empty(-(-n // 8) * self.bits, dtype=torch.uint8, device="meta")}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        packed = super().pack(weight)
        code = torch.stack((packed["weight"] >> 4, packed["weight"] & 15), 1).flatten()
        code = F.pad(code, (0, -code.numel() % 8))
        return packed | {"weight": pack_bits(code, self.bits)}


class NF3(FewBits):
    """8 codes at the quantiles of a normal distribution."""

    kind, bits = "nf3", 3


class NF2(FewBits):
    """4 codes at the quantiles of a normal distribution."""

    kind, bits = "nf2", 2
