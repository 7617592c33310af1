"""INT8: eight bits a weight, and a scale for every output.

    W = q * absmax / 127        q = round(127 W / absmax), absmax the largest magnitude of the row

Costs 8 + 32/in bits a weight. The bytes are those of bitsandbytes' LLM.int8() https://arxiv.org/abs/2208.07339 without
outliers; layers multiply with the unpacked weight, so that the gradient is exact. Without autograd a CPU multiplies
few rows with the codes themselves, and scales the result.
"""

import torch
from torch import Tensor

from litpeft.model.quantize.codes import chunk
from litpeft.model.quantize.quantized import Quantized

SMALL_BATCH = 256  # rows up to which the kernel is faster than unpacking the weight


class Int8(Quantized):
    """Weights as whole numbers from -127 to 127 times a scale of their row."""

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax = packed
        return (codes * absmax[:, None]).mul_(1 / 127).to(dtype)

    @staticmethod
    def small_batch(x: Tensor, codes: Tensor) -> bool:
        """Returns whether torch's kernel for codes takes x (..., in), and is the fastest for so few rows."""
        sizes = all(size % 32 == 0 for size in codes.shape)  # the kernel crashes on others, unchecked
        return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() <= SMALL_BATCH * x.size(-1) and sizes

    @staticmethod
    def product(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """Returns the product of x (..., in) and the weight codes * scale: (..., out), without a gradient."""
        y = torch._weight_int8pack_mm(x.reshape(-1, x.size(-1)), codes, scale)
        return y.view(*x.shape[:-1], len(codes))

    def base(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.small_batch(x, self.weight):
            return super().base(x)
        y = self.product(x, self.weight, (self.absmax / 127).to(x.dtype))
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def layout(self) -> dict[str, Tensor]:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        return {"weight": codes, "absmax": torch.empty(self.out_features, dtype=torch.float32, device="meta")}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, chunk(weight) // weight.size(1))  # at a time
        for start in range(0, len(weight), rows):
            x = weight[start : start + rows].detach().float()
            largest = absmax[start : start + rows] = x.abs().amax(1)
            scaled = x * (127 / largest)[:, None]
            codes[start : start + rows] = scaled.nan_to_num_(0).round_()  # 0 * inf in a row of zeros
        return {"weight": codes, "absmax": absmax}
