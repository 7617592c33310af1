"""The types of a GGUF file's tensors: their bytes, and the numbers that these say."""

import math

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
TORCH = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
CHUNK = 1 << 20  # weights that are quantised together


def encode(values: Tensor, type_: Type) -> Tensor:
    """Returns the bytes (rows, bytes) of weights (out, in), or of a vector with a number in each row."""
    rows = values.reshape(len(values), -1)
    if type_ in TORCH:
        return rows.to(TORCH[type_]).contiguous().view(torch.uint8)
    step = max(1, CHUNK // rows.size(1))
    parts = [gguf.quants.quantize(part.float().numpy(), type_) for part in rows.split(step)]
    return torch.from_numpy(np.concatenate(parts))


def decode(rows: Tensor, type_: Type, shape: tuple[int, ...]) -> Tensor:
    """Returns the float32 numbers of a tensor's bytes (rows, bytes)."""
    if type_ in TORCH:
        return rows.contiguous().view(TORCH[type_]).float().view(shape)
    step = max(1, CHUNK // shape[-1])
    parts = [torch.from_numpy(gguf.quants.dequantize(part.numpy(), type_)) for part in rows.split(step)]
    return torch.cat(parts).view(shape)


def row_bytes(shape: tuple[int, ...], type_: Type) -> int:
    """Returns the bytes of a row of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[type_]
    return math.prod(shape[1:]) * size // block
