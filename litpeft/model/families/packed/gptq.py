"""GPTQ and AWQ: whole numbers, a scale and a zero for each group of inputs of an output.

    W = (q - zero) scale        zero is held less 1 by GPTQ's files, unless their checkpoint_format is gptq_v2

The files hold W the other way round, (in, out). GPTQ packs neighbouring inputs into a word, AWQ neighbouring outputs,
those with even numbers first. https://arxiv.org/abs/2210.17323, https://arxiv.org/abs/2306.00978
"""

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.core.safetensors import Weights
from litpeft.model.families.packed.bits import Parts, beside, said, unpacked
from litpeft.model.families.packed.scaled import check_bits

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
WORD = 32  # bits
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where AWQ holds the outputs of a word


def parts(weights: Weights, name: str, shape: tuple[int, ...]) -> Parts:
    """Returns what the files have of a weight."""
    module, _, leaf = name.rpartition(".")
    found = beside(weights, module, LEAVES) if leaf == "weight" else []
    if f"{module}.qweight" not in found:
        return {}
    return {part: (shape[1],) if part.endswith(".g_idx") and len(shape) == 2 else None for part in found}


def read(weights: Weights, name: str) -> Tensor:
    """Returns a weight (out, in) in float32."""
    part = {one.rpartition(".")[2]: weights.read(one) for one in parts(weights, name, ())}
    words, scales = part["qweight"], part["scales"].float()  # (groups, out)
    config = said(weights)
    if config.get("quant_method") == "awq":
        if config.get("version", "gemm").lower() != "gemm" or config.get("bits", 4) != 4:
            what = "of AWQ's files those of 4 bits in the version gemm are read"
            raise ModelError(what, where=weights.folder, hint="take the model's plain weights")
        codes, zeros = (in_order(part[leaf]) for leaf in ("qweight", "qzeros"))
    else:
        bits = WORD * part["qzeros"].size(1) // scales.size(1)
        check_bits(weights, name, bits)
        codes, zeros = down(words, bits), unpacked(part["qzeros"], bits)
        if config.get("checkpoint_format", "gptq") == "gptq":
            zeros = (zeros + 1) & ((1 << bits) - 1)
    if "g_idx" in part:
        group = part["g_idx"].long()
        return codes.float().sub_(zeros[group]).mul_(scales[group]).t()
    codes = codes.float().unflatten(0, (len(scales), -1))
    return codes.sub_(zeros[:, None]).mul_(scales[:, None]).flatten(0, 1).t()


def down(words: Tensor, bits: int) -> Tensor:
    """Returns GPTQ's codes (in, out) of words (in * bits / 32, out)."""
    each = WORD // bits
    codes = torch.empty(len(words), each, words.size(1), dtype=torch.uint8)
    for at in range(each):
        codes[:, at] = (words >> bits * at) & ((1 << bits) - 1)
    return codes.flatten(0, 1)


def in_order(words: Tensor) -> Tensor:
    """Returns AWQ's codes (n, out) of words (n, out / 8)."""
    return unpacked(words, 4).unflatten(1, (-1, len(ORDER)))[..., ORDER].flatten(1)
