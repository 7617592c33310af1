"""INT8: eight bits a weight, and a scale for every output.

    W = q * absmax / 127        q = round(127 W / absmax), absmax the largest magnitude of the row

Costs 8 + 32/in bits a weight. The bytes are those of bitsandbytes' LLM.int8() https://arxiv.org/abs/2208.07339 without
outliers; what is computed with is the weight in full, so that the gradient is exact. Where none is needed, a CPU
multiplies few rows with the codes as they are, and scales the result.
"""

import torch
from torch import Tensor

from litpeft.storage.kernels import PIECE
from litpeft.storage.quantized import Quantized

FEW = 256  # rows up to which the kernel is faster than unpacking the weight


class Int8(Quantized):
    """Weights as whole numbers from -127 to 127 times a scale of their row."""

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, absmax = packed
        return (codes * absmax[:, None]).mul_(1 / 127).to(dtype)

    def base(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.bfloat16 or len(rows) > FEW:
            return super().base(x)
        if self.in_features % 32 or self.out_features % 32:  # sizes that torch's kernel does not check, and dies of
            return super().base(x)
        y = torch._weight_int8pack_mm(rows, self.weight, (self.absmax / 127).to(x.dtype))
        y = y if self.bias is None else y + self.bias.to(x.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def layout(self) -> dict[str, Tensor]:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="meta")
        return {"weight": codes, "absmax": torch.empty(self.out_features, dtype=torch.float32, device="meta")}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        rows = max(1, PIECE // weight.size(1))  # at a time: no float32 copy of the whole
        for start in range(0, len(weight), rows):
            x = weight[start : start + rows].detach().float()
            largest = absmax[start : start + rows] = x.abs().amax(1)
            scaled = x * (127 / largest)[:, None]
            codes[start : start + rows] = scaled.nan_to_num_(0).round_()  # 0 * inf in a row of zeros
        return {"weight": codes, "absmax": absmax}
