"""Tensors that files hold in four bits, read as plain ones: MXFP4 of gpt-oss, NF4 and FP4 of bitsandbytes.

MXFP4: W = code[q] 2^(e - 127), e for 32 inputs of an output        NF4, FP4: as in quantize/four_bit.py
"""

import json

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.model.quantize.codes import BLOCK, CODES, absmax_in_torch, dequantize_4bit

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
STATE = ".quant_state.bitsandbytes__"
OF_STATE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


def packed_parts(weights: Weights, name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...] | None]:
    """Returns the tensors that a folder has in place of `name` of this shape, each with its shape if that is known."""
    if name not in weights.file_of and f"{name}_blocks" in weights.file_of and len(shape) == 3:
        experts, inputs, outputs = shape
        groups = (experts, outputs, inputs // 32)
        return {f"{name}_blocks": (*groups, 16), f"{name}_scales": groups}
    if states := [f"{name}{STATE}{kind}" for kind in ("nf4", "fp4") if f"{name}{STATE}{kind}" in weights.file_of]:
        count = torch.Size(shape).numel()
        others = [f"{name}{part}" for part in OF_STATE if f"{name}{part}" in weights.file_of]
        return {name: ((count + 1) // 2, 1), states[0]: None} | dict.fromkeys(others)
    return {}


def read_packed(weights: Weights, name: str, expert: int | None) -> Tensor | None:
    """Returns a tensor (out, in) of the files, or of one expert of those that are stacked; None if it is not packed."""
    if name not in weights.file_of:
        blocks, scales = (weights.read(f"{name}_{part}")[expert] for part in ("blocks", "scales"))
        return mxfp4(blocks, scales)
    for kind in ("nf4", "fp4"):
        if f"{name}{STATE}{kind}" in weights.file_of:
            return four_bit(weights, name, kind)
    return None


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the weights (out, in) in bfloat16, exactly, of blocks (out, in / 32, 16) and scales (out, in / 32)."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2).int()
    table = torch.tensor((*E2M1, *(-value for value in E2M1)), dtype=torch.bfloat16)
    return torch.ldexp(table[codes], scales.int()[..., None] - 127).flatten(-2)


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
