"""The rotary frequencies. In float32, as those models were trained, and in the order of transformers' operations."""

import math

import torch
from torch import Tensor

from litpeft.model.config import Rope, RopeScaling
from litpeft.model.context import Context


def rope_frequencies(
    size: int, theta: float, scaling: RopeScaling | None, device: torch.device, length: int = 0
) -> Tensor:
    """Returns the rotary frequencies (size/2,) in radians a token, for a text of `length` tokens."""
    exponent = torch.arange(0, size, 2, device=device).float() / size
    if scaling is None:
        return 1.0 / theta**exponent
    factor, original = scaling.factor, scaling.original_positions
    if scaling.kind == "dynamic":
        stretch = factor * torch.tensor(max(length, original), device=device) / original - (factor - 1)
        return 1.0 / (theta * stretch ** (size / max(size - 2, 1))) ** exponent  # of size 2 the one frequency is 1
    if scaling.kind == "longrope":
        divisors = scaling.long_factors if length > original else scaling.short_factors
        return 1.0 / (torch.tensor(divisors, device=device) * theta**exponent)
    frequency = 1.0 / theta**exponent
    if scaling.kind == "linear":
        return frequency / factor
    if scaling.kind == "proportional":  # the last ones are 0: those dimensions do not rotate
        turning = torch.arange(size // 2, device=device) < int(scaling.share * size // 2)
        return frequency * turning / factor
    if scaling.kind == "llama3":  # long wavelengths are stretched, short ones kept, those between interpolated
        turns = original * frequency / (2 * math.pi)  # over the length that the model was trained on
        mix = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        mix = mix.clamp(0, 1)
        return mix * frequency + (1 - mix) * frequency / factor
    # yarn: a ramp over the dimensions, from those that are kept to those that are stretched
    low, high = (
        size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = (torch.arange(size // 2, device=device).float() - low) / (high - low or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * theta**exponent) * (1 - kept) + frequency * kept


def token_frequencies(size: int, rope: Rope, ctx: Context, device: torch.device) -> Tensor:
    """Returns the rotary frequencies of all tokens (size/2,), or of each (T, size/2) if they depend on its document."""
    given = size, rope.theta, rope.scaling, device
    if rope.scaling is None or not rope.scaling.by_length or ctx.documents is None:
        return rope_frequencies(*given, ctx.reach())
    lengths = ctx.documents.lengths
    of = {length: rope_frequencies(*given, length) for length in set(lengths)}
    return torch.cat([of[length].expand(length, -1) for length in lengths])
