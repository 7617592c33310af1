"""FP8: weights as floating-point numbers of eight bits (e4m3), and a scale for every output.

    W = q * scale        scale = absmax / 448, absmax the largest magnitude of the row; q = W / scale, rounded to e4m3

Costs 8 + 32/in bits a weight. E4m3 has a sign, four bits of exponent and three of mantissa: https://arxiv.org/abs/2209.05433.

A GPU of compute capability 8.9 or later multiplies such numbers itself. There, in bfloat16, the inputs of a product are
rounded to e4m3 too, each row with a scale of its own, and so are the gradients in the backward pass:

    y  = (qx * sx) (q * scale)^T        dx = (qd * sd) q,   qd * sd rounded from dy * scale

Elsewhere the weight is unpacked, and inputs and gradients are not rounded.
"""

import torch
from torch import Tensor

from litpeft.model.kernels import gpu_kernels
from litpeft.model.quantize.codes import chunk
from litpeft.model.quantize.quantized import Quantized

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # of both sizes of a weight, as the GPU's products want them
CAPABILITY = 8, 9


def quantize_rows(x: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns x (n, d), times `factors` (d,) if given, as e4m3 (n, d) and float32 scales (n, 1)."""
    if x.is_cuda and gpu_kernels() is not None:
        return gpu_kernels().quantize_rows(x, factors)
    x = x.float() if factors is None else x.float() * factors
    scale = x.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
    return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def transposed(codes: Tensor) -> Tensor:
    """Returns bytes (out, in) in the order (in, out), contiguous."""
    return gpu_kernels().transposed(codes) if codes.is_cuda and gpu_kernels() is not None else codes.t().contiguous()


def multiply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns W x, summed to bfloat16, with x rounded to e4m3: (..., in) -> (..., out)."""
    rows, row_scale = quantize_rows(x.reshape(-1, x.size(-1)))
    y = torch._scaled_mm(rows, codes.view(E4M3).t(), row_scale, scale[None], out_dtype=torch.bfloat16)
    return y.to(x.dtype).view(*x.shape[:-1], len(codes))


def multiply_back(dy: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Returns the gradient of x, summed to bfloat16, with dy * scale rounded to e4m3: (..., out) -> (..., in)."""
    rows, row_scale = quantize_rows(dy.reshape(-1, dy.size(-1)), scale)
    ones = scale.new_ones(1, codes.size(1))
    dx = torch._scaled_mm(rows, transposed(codes).view(E4M3).t(), row_scale, ones, out_dtype=torch.bfloat16)
    return dx.to(dy.dtype).view(*dy.shape[:-1], codes.size(1))


class RoundedProduct(torch.autograd.Function):
    """W x + b by `multiply`, and its gradients by `multiply_back`."""

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        y = multiply(x, codes, scale)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_dx, needs_dbias, *_ = ctx.needs_input_grad
        dx = multiply_back(dy, *ctx.saved_tensors) if needs_dx else None
        return dx, dy.reshape(-1, dy.size(-1)).sum(0) if needs_dbias else None, None, None


class FP8(Quantized):
    """Weights as numbers of e4m3 times a scale of their row."""

    stacks = ("weight", "scale")

    @classmethod
    def why_not(cls, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY:
            return None
        needed, has = (".".join(map(str, pair)) for pair in (CAPABILITY, torch.cuda.get_device_capability(device)))
        name = torch.cuda.get_device_name(device)
        return f"fp8 needs a GPU of compute capability {needed} or later, {name} has {has}"

    @classmethod
    def unpack(cls, packed: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scale = packed
        return (codes.view(E4M3).float() * scale[:, None]).to(dtype)

    @classmethod
    def has_product(cls, x: Tensor, shape: tuple[int, int]) -> bool:
        """Returns whether the device multiplies x with the codes (out, in)."""
        fits = shape[0] % MULTIPLE == 0 and shape[1] % MULTIPLE == 0
        return x.is_cuda and x.dtype == torch.bfloat16 and fits and cls.why_not(x.device) is None

    @classmethod
    def multiply(cls, x: Tensor, stacked: tuple[Tensor, ...], back: bool = False) -> Tensor | None:
        if not cls.has_product(x, stacked[0].shape):
            return None
        return (multiply_back if back else multiply)(x, *stacked)

    def base(self, x: Tensor) -> Tensor:
        if not self.has_product(x, self.weight.shape):
            return super().base(x)
        return RoundedProduct.apply(x, None if self.bias is None else self.bias.to(x.dtype), self.weight, self.scale)

    def layout(self) -> dict[str, Tensor]:
        codes = torch.empty(self.out_features, self.in_features, dtype=torch.uint8, device="meta")  # as FSDP takes them
        return {"weight": codes, "scale": torch.empty(self.out_features, dtype=torch.float32, device="meta")}

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        rows = max(1, chunk(weight) // weight.size(1))  # at a time
        parts = [quantize_rows(part.detach()) for part in weight.split(rows)]
        codes, scale = (torch.cat(some) for some in zip(*parts, strict=True))
        return {"weight": codes.view(torch.uint8), "scale": scale[:, 0]}
