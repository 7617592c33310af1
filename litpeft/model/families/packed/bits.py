"""Codes of a few bits each, out of the bytes that hold them."""

from typing import Any

import torch
from torch import Tensor

from litpeft.core.json import read_optional
from litpeft.core.safetensors import Weights

Parts = dict[str, tuple[int, ...] | None]  # tensors of the files, each with its shape if that is known
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Returns the codes in whole numbers, as uint8: the lowest bits come first, and a word has a row of them."""
    held = words.contiguous().view(torch.uint8)
    return torch.stack([(held >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)], -1).flatten(-2)


def e2m1(held: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the numbers in bytes that hold two each: a sign, two bits of exponent and one of mantissa."""
    return torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=dtype)[unpacked(held, 4).int()]


def beside(weights: Weights, module: str, leaves: tuple[str, ...]) -> list[str]:
    """Returns those tensors of a module that the files have."""
    return [name for leaf in leaves if (name := f"{module}.{leaf}") in weights.file_of]


def said(weights: Weights) -> dict[str, Any]:
    """Returns `quantization_config` of a folder's config.json."""
    found = read_optional(weights.folder / "config.json").get("quantization_config")
    return found if isinstance(found, dict) else {}
