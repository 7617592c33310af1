"""The tensors of a GGUF file of one model: their names, types and bytes, and which of our parameters each holds.

llama.cpp rotates neighbouring rows of q and k where a family has `pairs`:
    theirs  a0 b0 a1 b1 a2 b2 …        ours  a0 a1 a2 … b0 b1 b2 …        (a_i, b_i: the pair with frequency i)
Fused tensors hold all rows of q, then all of k and v, whatever their order in a Hugging Face folder.
"""

import math
from collections.abc import Collection
from dataclasses import fields
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.errors import ConfigError, ModelError
from litpeft.model.config import ModelConfig
from litpeft.model.families import FAMILIES, Gguf, family
from litpeft.model.families.names import NameMap
from litpeft.model.frequencies import rope_frequencies

TYPES = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
TORCH = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
CHUNK = 1 << 20  # weights that are quantised together
IN_FLOAT32 = ("norm.weight", "position_embd.weight", "ffn_gate_inp.weight")  # beside all vectors
ENDS = ("token_embd.weight", "output.weight")  # kept in eight bits where the rest has four
# Fields of ModelConfig that the header says for every family, or that follow from the tensors.
SAID = {
    "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions", "norm_eps",
    "rope_theta", "rope_scaling", "tie_embeddings", "window",
}  # fmt: skip


class Layout:
    """The tensors of the file by name. `parts` are the parameters of ours that each holds, in order."""

    def __init__(self, names: NameMap):
        self.names, self.config, self.gguf = names, names.config, known_family(names)
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf.arch)
        theirs = gguf.get_tensor_name_map(arch, self.config.n_layers)
        self.parts = {theirs.get_name(file, (".weight", ".bias")): parts for file, parts in names.parts.items()}
        if None in self.parts:
            lost = next(file for file in names.parts if theirs.get_name(file, (".weight", ".bias")) is None)
            raise ModelError(f"llama.cpp's {self.gguf.arch} has no place for {lost}")
        if self.gguf.own_head and self.config.tie_embeddings:
            self.parts["output.weight"] = self.parts["token_embd.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [self.names.ours[part] for part in self.parts[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def types(self, wanted: Type, in_groups: Collection[str] = ()) -> dict[str, Type]:
        """Returns each tensor's type; those of our weights `in_groups` keep their codes, as Q4_1."""
        return {name: Type.Q4_1 if in_groups and set(parts) <= set(in_groups) else self._type(name, wanted)
                for name, parts in self.parts.items()}  # fmt: skip

    def _type(self, name: str, wanted: Type) -> Type:
        shape = self.shape(name)
        if len(shape) == 1 or name.endswith(IN_FLOAT32):
            return Type.F32
        if wanted == Type.Q4_0 and name in ENDS:
            wanted = Type.Q8_0
        return Type.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted

    def stored(self, ours: str, rows: Tensor) -> Tensor:
        """Returns the rows (out, ...) of one of our parameters, in the file's order."""
        return rows_dealt_out(rows, self.config.head_dim) if self._deals_out(ours) else rows

    def ours(self, name: str, rows: Tensor) -> dict[str, Tensor]:
        """Returns the parameters of ours that a tensor (rows, ...) of the file holds."""
        given = rows.split([self.names.ours[part][0] for part in self.parts[name]])
        return {
            part: rows_in_halves(own, self.config.head_dim) if self._deals_out(part) else own
            for part, own in zip(self.parts[name], given, strict=True)
        }

    def added(self, name: str) -> float:
        """Returns what a tensor of the file has added to ours."""
        return self.gguf.norms if name.endswith("norm.weight") else 0.0

    def rope_divisors(self) -> Tensor | None:
        """Returns rope_freqs.weight: what the rotary frequencies are divided by, if each by another number."""
        rope = self.config.main_rope
        scaling = None if rope is None else rope.scaling
        if scaling is None or scaling.kind == "linear":
            return None
        plain, scaled = (
            rope_frequencies(self.config.rotary_size, rope.theta, how, torch.device("cpu")) for how in (None, scaling)
        )
        return plain / scaled

    def _deals_out(self, ours: str) -> bool:
        return self.gguf.pairs and ours.split(".")[-2] in ("q", "k")


def known_family(names: NameMap) -> Gguf:
    """Returns how llama.cpp has a model's family; raises if it does not compute what the model does."""
    hint = "write safetensors, and convert them with llama.cpp's own script"
    known = getattr(family(names.family), "GGUF", None)
    if known is None:
        have = ", ".join(name for name in FAMILIES if hasattr(family(name), "GGUF"))
        raise ConfigError(f"{names.family} is not written as GGUF; {have} are", where="to", hint=hint)
    free = SAID | {field for field, _ in map(known.key, known.keys)}
    for one in fields(ModelConfig):
        value, fine = getattr(names.config, one.name), allowed(known, names.config, one.name)
        if (one.name in known.graph or one.name not in free) and value not in fine:
            said = " or ".join(map(str, fine))
            what = f"llama.cpp's {known.arch} computes with {one.name} {said}, and this model has {value}"
            raise ConfigError(what, where="to", hint=hint)
    rope = names.config.main_rope
    scaling = None if rope is None else rope.scaling
    if scaling is not None and scaling.kind not in ("linear", "llama3"):
        raise ConfigError(f"rope scaling {scaling.kind} is not written as GGUF", where="to", hint=hint)
    return known


def allowed(known: Gguf, config: ModelConfig, name: str) -> tuple[Any, ...]:
    """Returns the values of a field of ModelConfig that llama.cpp computes with, if the header does not say it."""
    default = next(field.default for field in fields(ModelConfig) if field.name == name)
    values = known.graph.get(name, (default,))
    return values(config) if callable(values) else values


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


def rows_dealt_out(rows: Tensor, head_dim: int) -> Tensor:
    """Returns q or k (heads * D, ...) with each head's rows a0 a1 … b0 b1 … reordered to a0 b0 a1 b1 …."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rows_in_halves(values: Tensor, head_dim: int) -> Tensor:
    """Returns q or k (heads * D, ...) with each head's rows a0 b0 a1 b1 … reordered to a0 a1 … b0 b1 …."""
    heads = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)
