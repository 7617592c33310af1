"""Codes of two, three or four bits in bytes."""

import torch
from torch import Tensor

PARTS = {2: (2,), 3: (2, 1), 4: (4,)}  # bits of a code that lie together, the high ones first; each divides 8


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Returns the bytes (..., n * bits / 8) of codes (..., n); n is a multiple of 8.

    Byte i of a part of w bits holds the codes i, i + n w / 8, i + 2 n w / 8, ..., the first in its lowest bits.
    """
    parts, left = [], bits
    for width in PARTS[bits]:
        left -= width
        part = (codes >> left & (1 << width) - 1).unflatten(-1, (8 // width, -1))
        parts.append((part << _shifts(width, codes.device)).sum(-2, dtype=torch.uint8))
    return torch.cat(parts, -1)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Returns the codes (..., n) of bytes (..., n * bits / 8)."""
    n, codes = packed.size(-1) * 8 // bits, None
    for part in packed.split([n * width // 8 for width in PARTS[bits]], -1):
        width = part.size(-1) * 8 // n
        values = (part[..., None, :] >> _shifts(width, packed.device) & (1 << width) - 1).flatten(-2)
        codes = values if codes is None else codes << width | values
    return codes


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)[:, None]
