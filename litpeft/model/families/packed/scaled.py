"""Codes times a scale: FP8 as DeepSeek and Qwen write it, and the files of compressed-tensors and of ModelOpt.

    W = q scale        W = (q - zero) scale

A scale is that of the weight, of an output, or of a block of outputs and inputs. NVFP4 has one in eight bits for each
16 inputs of an output, and one for all. What is beside it of inputs is not used: they are not rounded here.
"""

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.model.families.packed.bits import Parts, beside, e2m1, said, unpacked

SCALES = ("weight_scale_inv", "weight_scale")  # the first is a factor as well
OTHERS = ("weight_scale_2", "weight_global_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
OF_INPUTS = ("activation_scale", "input_scale", "input_zero_point", "input_global_scale")
BLOCK = [128, 128]  # outputs and inputs with one scale, where config.json does not say it
GROUP = 16  # inputs with one scale of NVFP4


def parts(weights: Weights, name: str, shape: tuple[int, ...]) -> Parts:
    """Returns what the files have of a weight with a scale."""
    module, _, leaf = name.rpartition(".")
    scales = beside(weights, module, SCALES) if leaf == "weight" else []
    if not scales:
        return {}
    packed = beside(weights, module, ("weight_packed",))
    codes = {packed[0]: None} if packed else {name: None if weights.dtype(name) == "U8" else shape}
    return codes | dict.fromkeys([*scales, *beside(weights, module, OTHERS + OF_INPUTS)])


def read(weights: Weights, name: str) -> Tensor:
    """Returns a weight (out, in) in float32."""
    held = {part.rpartition(".")[2]: part for part in parts(weights, name, ())}
    part = {leaf: weights.read(one) for leaf, one in held.items() if leaf not in OF_INPUTS}
    codes = part.get("weight", part.get("weight_packed"))
    scale = part.get("weight_scale_inv", part.get("weight_scale")).float()
    zero = part.get("weight_zero_point")
    if codes.dtype == torch.uint8:
        whole = part["weight_scale_2"] if "weight_scale_2" in part else 1 / part["weight_global_scale"]
        scale = (scale * whole.float()).repeat_interleave(GROUP, 1)
        return e2m1(codes, torch.float32) * scale
    if "weight_packed" in part:
        rows, columns = part["weight_shape"].tolist()
        bits = 32 * codes.size(1) // columns
        check_bits(weights, name, bits)
        middle = 1 << bits - 1  # codes are held as whole numbers without a sign
        codes = unpacked(codes, bits)[:, :columns].float() - middle
        if zero is not None:
            zero = unpacked(zero.t(), bits).t()[:rows].float() - middle
    if "weight_g_idx" in part and part["weight_g_idx"].min() >= 0:  # the group of each input; -1: they follow
        groups = part["weight_g_idx"].long()
        scale, zero = scale[:, groups], None if zero is None else zero[:, groups]
    codes = codes.float()
    if zero is not None:
        codes = codes - spread(weights, name, zero.float(), codes.shape)
    return codes * spread(weights, name, scale, codes.shape)


def spread(weights: Weights, name: str, scale: Tensor, shape: torch.Size) -> Tensor:
    """Returns a scale that broadcasts to a weight (out, in)."""
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    blocks = block_of(weights)
    for axis, size in enumerate(shape):
        count = scale.size(axis)
        if count in (1, size):
            continue
        each = size // count if blocks is None else blocks[axis]
        if -(-size // each) != count:
            what = f"{name} has scales {tuple(scale.shape)}, which do not fit its shape {tuple(shape)}"
            what += "" if blocks is None else f" and blocks of {blocks[0]} x {blocks[1]}"
            raise ModelError(what, where=weights.folder, hint="take the model's plain weights")
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return scale


def block_of(weights: Weights) -> list[int] | None:
    """Returns how many outputs and inputs have one scale; None where that follows from the number of scales."""
    config = said(weights)
    if config.get("quant_method") == "fp8":
        return config.get("weight_block_size") or BLOCK
    groups = config.get("config_groups")
    schemes = [one.get("weights") or {} for one in groups.values()] if isinstance(groups, dict) else []
    found = next((one["block_structure"] for one in schemes if one.get("block_structure")), None)
    return [int(size) for size in found.split("x")] if isinstance(found, str) else found


def check_bits(weights: Weights, name: str, bits: int) -> None:
    """Raises for codes that lie in more than one byte."""
    if bits not in (1, 2, 4, 8):
        hint = "take the model's plain weights"
        raise ModelError(f"{name} has codes of {bits} bits; 2, 4 and 8 are read", where=weights.folder, hint=hint)
