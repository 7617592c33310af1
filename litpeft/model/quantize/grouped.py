"""INT4, INT3 and INT2: few bits a weight, and a scale and a shift for every 32 inputs of an output.

    W[o, k] = scale[o, G] * q[o, k] + shift[o, G]        G = k // 32, q a whole number from 0 to 2^bits - 1

The zero point of a group, -shift / scale, is a real number. Scale and shift come from the smallest and the largest
weight of the group, and are float16: GGUF's Q4_1 holds the same numbers. Costs bits + 1 bits a weight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.model.affine import Affine
from litpeft.model.quantize.bits import pack_bits, unpack_bits
from litpeft.model.quantize.codes import chunk
from litpeft.model.quantize.quantized import Quantized

GROUP = 32  # inputs that share a scale; the last group of a row may have fewer


def grouped(tensor: Tensor) -> Tensor:
    """Returns (rows, in) as (rows, groups, GROUP); what the last group lacks is its last number again."""
    padded = F.pad(tensor[None], (0, -tensor.size(1) % GROUP), mode="replicate")[0]
    return padded.unflatten(1, (-1, GROUP))


class Grouped(Quantized):
    """Weights as whole numbers that each group of inputs scales and shifts."""

    bits: int

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scale, shift = packed
        wide = torch.promote_types(dtype, torch.float32)
        q = unpack_bits(codes, cls.bits).unflatten(1, (-1, GROUP)).to(wide)
        weight = q.mul_(scale.to(wide)[..., None]).add_(shift.to(wide)[..., None])
        return weight.flatten(1)[:, : shape[1]].to(dtype).contiguous()

    def codes(self) -> Tensor:
        """Returns the code of each weight (out, in), from 0 to 2^bits - 1."""
        return unpack_bits(self.weight, self.bits)[:, : self.in_features]

    def layout(self) -> dict[str, Tensor]:
        groups = -(-self.in_features // GROUP)
        codes = torch.empty(self.out_features, groups * GROUP * self.bits // 8, dtype=torch.uint8, device="meta")
        constants = torch.empty(self.out_features, groups, dtype=torch.float16, device="meta")
        return {"weight": codes, "scale": constants, "shift": constants.clone()}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        rows, parts = max(1, chunk(weight) // weight.size(1)), []  # at a time
        for part in weight.detach().split(rows):
            x, top = grouped(part.float()), 2**self.bits - 1
            low, high = x.aminmax(dim=-1)
            shift = low.half()
            # by a tensor: a GPU multiplies with the reciprocal of a number, and half of the last bits would be others
            scale = ((high - shift) / torch.full_like(high, top)).clamp(min=0).half()
            if not (scale.isfinite() & shift.isfinite()).all():
                what = f"a weight is beyond {torch.finfo(torch.float16).max:.0f}, the largest number of float16"
                raise ModelError(what, where="base.quantize", hint="take nf4 or int8")
            q = ((x - shift[..., None]) / scale[..., None]).round_().clamp_(0, top).nan_to_num_(0)  # where scale is 0
            parts.append((pack_bits(q.byte().flatten(1), self.bits), scale, shift))
        return dict(zip(self.packed_names, map(torch.cat, zip(*parts, strict=True)), strict=True))

    def folded(self, affine: Affine) -> dict[str, Tensor] | None:
        scale, shift = (t.to(torch.promote_types(self.dtype, torch.float32)) for t in (self.scale, self.shift))
        if affine.gain is not None:
            scale, shift = (affine.gain[:, None].to(t.dtype) * t for t in (scale, shift))
        if affine.A is not None:
            a = grouped(affine.A)
            if (a != a[..., :1]).any():
                return None
            shift = shift + (affine.B @ a[..., 0]).to(shift.dtype)
        return {"weight": self.weight, "scale": self.scale if affine.gain is None else scale, "shift": shift}


class Int4(Grouped):
    """16 steps from the smallest weight of a group to its largest."""

    bits = 4


class Int3(Grouped):
    """8 steps from the smallest weight of a group to its largest."""

    bits = 3


class Int2(Grouped):
    """4 steps from the smallest weight of a group to its largest."""

    bits = 2
