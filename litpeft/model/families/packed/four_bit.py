"""Four bits of bitsandbytes (NF4, FP4), and MXFP4 of gpt-oss.

MXFP4: W = code[q] 2^(e - 127), e for 32 inputs of an output        NF4, FP4: as in quantize/four_bit.py
"""

import json

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.model.families.packed.bits import Parts, e2m1
from litpeft.model.quantize.codes import BLOCK, CODES, absmax_in_torch, dequantize_4bit

STATE = ".quant_state.bitsandbytes__"
OF_STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def mxfp4_parts(weights: Weights, name: str, shape: tuple[int, ...]) -> Parts:
    parts = [f"{name}_blocks", f"{name}_scales"]
    if name in weights.file_of or parts[0] not in weights.file_of:
        return {}
    if len(shape) != 3:
        return dict.fromkeys(parts)
    experts, inputs, outputs = shape
    groups = (experts, outputs, inputs // 32)
    return dict(zip(parts, ((*groups, 16), groups), strict=True))


def read_mxfp4(weights: Weights, name: str, expert: int) -> Tensor:
    return mxfp4(*(weights.read(f"{name}_{part}")[expert] for part in ("blocks", "scales")))


def bitsandbytes_parts(weights: Weights, name: str, shape: tuple[int, ...]) -> Parts:
    states = [f"{name}{STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{STATE}{kind}" in weights.file_of]
    if not states:
        return {}
    others = [f"{name}{part}" for part in OF_STATE if f"{name}{part}" in weights.file_of]
    return {name: ((torch.Size(shape).numel() + 1) // 2, 1), states[0]: None} | dict.fromkeys(others)


def read_bitsandbytes(weights: Weights, name: str) -> Tensor:
    return four_bit(weights, name, next(kind for kind in ("nf4", "fp4") if f"{name}{STATE}{kind}" in weights.file_of))


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the weights (out, in) in bfloat16, exactly, of blocks (out, in / 32, 16) and scales (out, in / 32)."""
    return torch.ldexp(e2m1(blocks, torch.bfloat16), scales.int()[..., None] - 127).flatten(-2)


def four_bit(weights: Weights, name: str, kind: str) -> Tensor:
    """Returns the weights in float32 of a layer that bitsandbytes saved; packed again they have the same codes."""
    state = json.loads(bytes(weights.read(f"{name}{STATE}{kind}").tolist()))
    table = weights.read(f"{name}.quant_map")
    if state.get("blocksize") != BLOCK or not torch.equal(table, torch.tensor(CODES[kind])):
        what = f"{name} has blocks of {state.get('blocksize')} or other codes; {BLOCK} and those of {kind} are read"
        raise ModelError(what, where=weights.folder, hint="take the model's plain weights")
    absmax = weights.read(f"{name}.absmax").clone()
    if f"{name}.nested_absmax" in weights.file_of:
        offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
        absmax = absmax_in_torch(absmax, weights.read(f"{name}.nested_absmax").clone(), offset)
    codes = weights.read(name).clone().flatten()
    return dequantize_4bit(codes, absmax, None, None, tuple(state["shape"]), kind, torch.float32)
