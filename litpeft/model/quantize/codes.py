"""Weights in four bits or fewer, in torch and in bitsandbytes' kernels: the same bytes, and the same numbers back.

A weight is flattened row by row and cut into blocks of 64, which may cross rows; n values make b = ceil(n / 64) blocks.
A block keeps its largest magnitude (`absmax`) and, for each value, the nearest of 16 codes times it. Two codes make a
byte, the first in the high half.
"""

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from litpeft.model.kernels import gpu_kernels

BLOCK = 64  # values that share an absmax
GROUP = 256  # values of absmax that share a scale, with double quantisation
CHUNK = 1 << 19  # values that are packed at a time: their float32 copies fit a processor's cache
GPU_CHUNK = 1 << 24  # on a GPU, which packs fewer no faster: it waits for the launch of each kernel
AMBIGUOUS = 255  # not a code: the table of `_cells` does not decide
TINY = 1e-38  # a block of zeros is divided by this instead
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
    *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # quantiles of a normal distribution
FP4 = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
    *(-0.0, -0.0052083334885537624, -0.6666666865348816, -1.0),
    *(-0.3333333432674408, -0.5, -0.1666666716337204, -0.25),
)  # the high bit is the sign
NF3 = (
    *(-1.0, -0.4786291600, -0.2171418178, 0.0),
    *(0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0),
)  # as NF4: 2^(bits - 1) + 1 quantiles above 0 with it, 2^(bits - 1) below, over the largest
NF2 = (-1.0, 0.0, 0.33791524171829224, 1.0)
CODES = {"nf4": NF4, "fp4": FP4, "nf3": NF3, "nf2": NF2}
KERNELS = ("nf4", "fp4")  # kinds that bitsandbytes knows
KNOWN = (torch.float32, torch.bfloat16, torch.float16)  # types that bitsandbytes' kernels take


@cache
def bitsandbytes() -> ModuleType:
    """Returns bitsandbytes, imported without its line about a kernel that only its own 4-bit layers would use."""
    import logging

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@cache
def has_kernels(device: str) -> bool:
    """Returns whether bitsandbytes has kernels for this type of device; elsewhere torch does the work."""
    try:
        bitsandbytes()
    except (ImportError, OSError):  # not installed, or built for another system
        return False
    names = ("bitsandbytes::dequantize_4bit", "bitsandbytes::dequantize_blockwise")
    return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, device.upper()) for name in names)


def has_product(x: Tensor) -> bool:
    """Returns whether bitsandbytes multiplies x with weights that stay packed."""
    return x.is_cuda and x.dtype in KNOWN and has_kernels("cuda")


# 1. quantise: by torch on every device, so that a base has the same bytes wherever it was packed


@cache
def _cells(kind: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the code of every float32 by its upper half (65536,) uint8, the midpoints (15,) and codes in order (16,).

    The upper half (sign, exponent, 7 bits) says between which midpoints a number lies, but for 16 of the 65536.
    """
    code = torch.tensor(CODES[kind], device=device)
    order = code.argsort(stable=True)
    middle = (code[order][:-1] + code[order][1:]) / 2
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device=device) << 16
    first, last = (torch.bucketize(bits.view(torch.float32), middle) for bits in (half, half | 0xFFFF))
    return torch.where(first == last, order[first], AMBIGUOUS).byte(), middle, order.byte()


def _nearest(x: Tensor, kind: str) -> Tensor:
    """Returns the nearest code of each number in [-1, 1], as uint8 (n,); of two as near, the lower number's."""
    table, middle, order = _cells(kind, x.device)
    code = table.index_select(0, (x.view(torch.int32) >> 16).add_(1 << 15))
    unsure = (code == AMBIGUOUS).nonzero().flatten()
    code[unsure] = order[torch.bucketize(x[unsure], middle)]
    return code


def _packed(code: Tensor) -> Tensor:
    """Returns the codes (n,) two to a byte, the first in the high half; n is even."""
    pair = code.view(torch.int16)  # little-endian: the first is the low byte
    return (pair << 4 | pair >> 8).byte()


def chunk(weight: Tensor) -> int:
    """Returns how many values of a weight are packed at a time: there is no float32 copy of all of them."""
    return GPU_CHUNK if weight.is_cuda else CHUNK


def quantize_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Returns packed codes (ceil(n / 2),) and absmax (b,) in float32 of n values; works chunk by chunk."""
    flat = weight.detach().reshape(-1)
    n = flat.numel()
    full = n - n % BLOCK  # values in full blocks
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // BLOCK), dtype=torch.float32, device=flat.device)
    for start in range(0, full, chunk(flat)):
        end = min(start + chunk(flat), full)
        x = flat[start:end].float().view(-1, BLOCK)
        largest = torch.amax(x.abs(), -1, out=absmax[start // BLOCK : end // BLOCK])
        # times the reciprocal, as bitsandbytes does: a quotient would round some values to the neighbouring code
        x = x * (1 / largest.clamp(min=TINY))[:, None]
        packed[start // 2 : end // 2] = _packed(_nearest(x.flatten(), kind))
    if n > full:  # the last block is short; its values are divided by absmax
        x = flat[full:].float()
        absmax[-1] = x.abs().max().clamp(min=TINY)
        x = F.pad(x / absmax[-1], (0, n % 2))
        packed[full // 2 :] = _packed(_nearest(x, kind))
    return packed, absmax


@cache
def dynamic_codes(device: torch.device) -> Tensor:
    """Returns the 256 codes of the signed dynamic data type (float32, rising): the fewer decimals, the more digits."""
    codes = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        codes += [means, -means]
    return torch.cat(codes).sort().values.to(device)


@cache
def _dynamic_cells(device: torch.device) -> Tensor:
    """Returns the nearest dynamic code, as uint8, of 65536 numbers spread evenly over [-1, 1]."""
    code = dynamic_codes(torch.device("cpu")).double()
    x = torch.arange(1 << 16, dtype=torch.float64) * 2 / 65535 - 1
    return torch.bucketize(x, (code[:-1] + code[1:]) / 2).byte().to(device)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns absmax (b,) as 8-bit codes (b,), their scales (ceil(b / 256),) and the mean that was taken off (1,)."""
    offset = absmax.mean()
    x = F.pad(absmax - offset, (0, -absmax.numel() % GROUP)).view(-1, GROUP)
    scale = x.abs().amax(-1)
    x = (x * (1 / scale)[:, None]).nan_to_num_(0).clamp_(-1, 1)
    cell = ((x + 1) * 32767.5 + 0.5).int()  # bitsandbytes looks the nearest code up in 65536 cells, too
    code = _dynamic_cells(absmax.device)[cell].masked_fill_((scale == 0)[:, None], 0)
    return code.flatten()[: absmax.numel()].contiguous(), scale, offset[None]


# 2. dequantise: our kernel on a GPU, else bitsandbytes' where there is one, else torch; as one operator, which compiles


def absmax_in_torch(absmax: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Returns the float32 absmax (b,) of double-quantised ones."""
    value = dynamic_codes(absmax.device)[absmax.int()]
    value = F.pad(value, (0, -value.numel() % GROUP)).view(-1, GROUP) * scale[:, None]
    return value.flatten()[: absmax.numel()] + offset


@cache
def code_table(kind: str, device: torch.device) -> Tensor:
    """Returns the number that each code stands for (16,), in float32; a kind with fewer codes has zeros at its end."""
    code = torch.tensor(CODES[kind], device=device)
    return F.pad(code, (0, 16 - len(code)))


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Returns for each byte the two numbers that it stands for, as one int64 that holds both float32 (256,)."""
    code, byte = code_table(kind, device), torch.arange(256, device=device)
    return torch.stack((code[byte >> 4], code[byte & 15]), -1).view(torch.int64).flatten()


def dequantize_in_torch(codes: Tensor, absmax: Tensor, shape: list[int], kind: str, dtype: torch.dtype) -> Tensor:
    """Returns the weight (out, in) of packed codes and float32 absmax, computed in float32 and rounded once."""
    n = shape[0] * shape[1]
    value = _pairs(kind, codes.device).index_select(0, codes.int()).view(torch.float32)
    if value.numel() % BLOCK:
        value = F.pad(value, (0, -value.numel() % BLOCK))
    value = value.view(-1, BLOCK).mul_(absmax[:, None]).flatten()
    return (value[:n].clone() if value.numel() > n else value).to(dtype).view(shape)


@torch.library.custom_op("litpeft::dequantize_4bit", mutates_args=())
def dequantize_4bit(
    codes: Tensor,
    absmax: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    kind: str,
    dtype: torch.dtype,
) -> Tensor:
    """Returns the weight (out, in); with `scale` and `offset` the absmax are 8-bit codes themselves."""
    if codes.is_cuda:
        weight = torch.empty(shape, dtype=dtype, device=codes.device)
        if _filled(weight, codes, absmax, scale, offset, kind):
            return weight
    kernels = has_kernels(codes.device.type)
    if scale is not None:
        if kernels:
            table = dynamic_codes(codes.device)
            absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, scale, table, GROUP, torch.float32) + offset
        else:
            absmax = absmax_in_torch(absmax, scale, offset)
    if not kernels or kind not in KERNELS:
        return dequantize_in_torch(codes, absmax, shape, kind, dtype)
    n = shape[0] * shape[1]
    # blocks run over the flattened weight, but on a CPU bitsandbytes begins one with each row, and gives wrong numbers
    # for rows that are no whole blocks; all of its kernels take rows of even length only
    rows = shape if shape[1] % BLOCK == 0 else [1, n + n % 2]
    given = dtype if dtype in KNOWN else torch.float32
    weight = torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, kind, rows, given)
    return weight.flatten()[:n].view(shape).to(dtype)


@dequantize_4bit.register_fake
def _(codes: Tensor, absmax: Tensor, scale: Tensor, offset: Tensor, shape: list[int], kind: str, dtype: torch.dtype):
    return codes.new_empty(shape, dtype=dtype)


def _filled(
    weight: Tensor, codes: Tensor, absmax: Tensor, scale: Tensor | None, offset: Tensor | None, kind: str
) -> bool:
    """Fills a weight by the project's own kernel, if that can be used; returns whether it could."""
    ours = gpu_kernels() if codes.is_cuda else None
    if ours is None or weight.dtype not in KNOWN or not weight.is_contiguous():
        return False
    table = code_table(kind, codes.device)
    ours.dequantize_4bit(codes, absmax, scale, offset, table, dynamic_codes(codes.device), weight)
    return True


def fill_4bit(weight: Tensor, packed: tuple[Tensor, ...], kind: str) -> None:
    """Writes the weight of packed tensors over `weight` (out, in); without autograd."""
    codes, absmax, scale, offset = packed if len(packed) == 4 else (*packed, None, None)
    if not _filled(weight, codes, absmax, scale, offset, kind):
        weight.copy_(dequantize_4bit(codes, absmax, scale, offset, weight.shape, kind, weight.dtype))


def product_4bit(x: Tensor, packed: tuple[Tensor, ...], outputs: int, kind: str, bias: Tensor | None) -> Tensor:
    """Returns W x + b: (..., in) -> (..., out); for few rows of x the weight (outputs, in) is not unpacked.

    Without autograd, and if `has_product`; `in` is a multiple of 64. `packed` are the first arguments of
    dequantize_4bit.
    """
    codes, absmax, *nested = packed
    first, twice = absmax, (None, None, None)
    if nested:
        first, twice = nested[0], (absmax, dynamic_codes(x.device), nested[1][0])
    bias = None if bias is None else bias.to(x.dtype)
    return torch.ops.bitsandbytes.gemm_4bit(x, codes, [outputs, x.size(-1)], first, BLOCK, kind, bias, *twice)
