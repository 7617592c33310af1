"""Weights that files hold in eight bits or less, read as plain ones.

What of them a folder has is seen from the names of its tensors; each kind has a function that returns those of a
weight, and one that reads it.
"""

from torch import Tensor

from litpeft.core.safetensors import Weights
from litpeft.model.families.packed import four_bit, gptq, scaled
from litpeft.model.families.packed.bits import Parts

KINDS = (
    (four_bit.mxfp4_parts, four_bit.read_mxfp4),
    (four_bit.bitsandbytes_parts, four_bit.read_bitsandbytes),
    (scaled.parts, scaled.read),
    (gptq.parts, gptq.read),
)


def packed_parts(weights: Weights, name: str, shape: tuple[int, ...]) -> Parts:
    """Returns the tensors that a folder has in place of `name` of this shape."""
    return next(filter(None, (parts(weights, name, shape) for parts, _ in KINDS)), {})


def read_packed(weights: Weights, name: str, expert: int | None) -> Tensor | None:
    """Returns a tensor (out, in) of the files, or of one expert of those that are stacked; None if it is not packed."""
    for parts, read in KINDS:
        if parts(weights, name, ()):
            return read(weights, name) if expert is None else read(weights, name, expert)
    return None
