"""The tensors of a GGUF file of one model: their names, types and bytes, and which of our parameters each holds.

llama.cpp rotates neighbouring rows of q and k where a family has `pairs`:
    theirs  a0 b0 a1 b1 a2 b2 …        ours  a0 a1 a2 … b0 b1 b2 …        (a_i, b_i: the pair with frequency i)
Fused tensors hold all rows of q, then all of k and v, whatever their order in a Hugging Face folder, except BY_HEAD.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litpeft.core.errors import ConfigError
from litpeft.exchange.gguf.by_layer import divisors
from litpeft.exchange.gguf.latent import joined, split_names, split_shapes
from litpeft.exchange.gguf.linear import CONVS, OF_HEADS, computed, own_name, restored, rows_in_turn, shape_of
from litpeft.model.config import ModelConfig
from litpeft.model.families import FAMILIES, Gguf, family, split_name
from litpeft.model.families.names import NameMap
from litpeft.model.frequencies import rope_frequencies
from litpeft.model.parts import linear_of, state_space_of

IN_FLOAT32 = (  # beside all vectors
    "norm.weight", "position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", *CONVS, *OF_HEADS,
    ".bias",
)  # fmt: skip
BY_HEAD = (
    "attn_q.weight",
    "ssm_ba.weight",
    "ssm_in.weight",
)  # with rows of each part for each head, if there are several
ENDS = ("token_embd.weight", "output.weight")  # kept in eight bits where the rest has four
HEAD = "head.weight"
HINT = "write safetensors, and convert them with llama.cpp's own script"
DIVISORS = "rope_freqs.weight"
LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
SCALED_IN = {"dynamic": (), "llama3": ("llama", "exaone4"), "longrope": ("llama", "phi3")}  # the others: everywhere
PLAIN_WINDOWS = ("olmo2",)  # whose layers with a window rotate without the scaling of the others
# Fields of ModelConfig that the header says for every family, or that follow from the tensors.
SAID = {
    "vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_positions", "norm_eps",
    "rope_theta", "rope_scaling", "tie_embeddings", "window",
}  # fmt: skip
# field of ModelConfig -> keys of config.json that decide it; a family's class has some of them
DECIDED_BY = {
    "activation": ("hidden_act", "activation", "activation_function", "hidden_activation"),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts",),
    "layers": ("layer_types", "sliding_window", "max_window_layers", "no_rope_layers"),
    "mlp_bias": ("mlp_bias", "use_bias", "bias"),
    "n_kv_heads": ("num_key_value_heads",),
    "output_bias": ("attention_bias", "use_bias", "bias"),
    "parallel_residual": ("parallel_attn", "use_parallel_residual"),
    "qk_norm": ("qk_layernorm", "use_qk_norm"),
    "qkv_bias": ("attention_bias", "use_qkv_bias", "use_bias", "bias"),
    "rotary_dim": ("position_embedding_type",),
    "score_scale": ("query_pre_attn_scalar", "attention_multiplier"),
}


class Layout:
    """The tensors of the file by name. `parts` are the parameters of ours that each holds, in order."""

    def __init__(self, names: NameMap):
        self.names, self.config, self.gguf = names, names.config, known_family(names)
        self.turned = linear_of(self.config.layers) if self.gguf.values_in_turn else None
        self.mamba = state_space_of(self.config.layers)
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.gguf.arch)
        theirs = gguf.get_tensor_name_map(arch, self.config.n_layers)
        self.parts: dict[str, list[str]] = {}
        for file, parts in names.parts.items():
            for part in parts:
                known = of_expert(part) or own_name(part, self.mamba is not None) or self._own(part)
                for name in split_names(part) or [known or self._name(theirs, file, part)]:
                    self.parts.setdefault(name, []).append(part)
        if self.gguf.own_head and self.config.tie_embeddings:
            self.parts["output.weight"] = self.parts["token_embd.weight"]

    def _own(self, part: str) -> str | None:
        """Returns the name of a tensor that the family's line has, not the tables of llama.cpp."""
        module, numbers, leaf = split_name(part)
        return f"{self.gguf.names[module].format(*numbers)}.{leaf}" if module in self.gguf.names else None

    def _name(self, theirs: gguf.TensorNameMap, file: str, part: str) -> str:
        """Returns the name that llama.cpp has for a tensor of a Hugging Face folder."""
        spelt = f"{file.removesuffix('_bias')}.bias" if file.endswith("_bias") else file  # of a router's correction
        name = theirs.get_name(spelt, (".weight", ".bias"))
        if name is None:
            why = ", since it ties embedding and head (config.json: tie_word_embeddings)" if part == HEAD else ""
            raise ConfigError(f"llama.cpp's {self.gguf.arch} has no place for {file}{why}", where="to", hint=HINT)
        return name if name.endswith((".weight", ".bias")) else f"{name}.weight"

    def join_queries(self, stored: Collection[str]) -> None:
        """Takes the queries, keys and values of a layer as one tensor where a file has them so, in this order.

        Qwen3-Next's older files have with them what gates them, by key head.
        """
        for name in stored:
            block, mark, _ = name.partition("ssm_in.weight")
            if mark and self.turned is None and f"{block}attn_gate.weight" in self.parts:
                self.parts[name] = [
                    *self.parts.pop(f"{block}attn_qkv.weight"),
                    *self.parts.pop(f"{block}attn_gate.weight"),
                ]
            block, mark, leaf = name.partition("attn_qkv")
            apart = [f"{block}attn_{one}{leaf}" for one in "qkv"]
            if mark and name not in self.parts and self.parts.keys() >= {*apart} and self.groups(apart[0]) == 1:
                self.parts[name] = [part for one in apart for part in self.parts.pop(one)]

    def shape(self, name: str) -> tuple[int, ...]:
        shapes, split = [self.names.ours[part] for part in self.parts[name]], split_names(self.parts[name][0])
        if name in split:
            return split_shapes(self.config)[split.index(name)]
        if of_expert(self.parts[name][0]):
            return (len(shapes), *shapes[0])
        if self.mamba is not None and (own := shape_of(name, self.mamba)):
            return own
        return (sum(shape[0] for shape in shapes), *shapes[0][2 if name.endswith(CONVS) else 1 :])

    def groups(self, name: str) -> int:
        """Returns how many groups of rows a tensor consists of, each with rows of every part."""
        return self.names.groups(self.parts[name][0]) if len(self.parts[name]) > 1 and name.endswith(BY_HEAD) else 1

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
        if self.turned is not None:
            return rows_in_turn(ours, rows, self.turned)
        return rows_dealt_out(rows, self.config.head_dim) if self._deals_out(ours) else rows

    def moves_inputs(self, ours: str) -> bool:
        """Returns whether the file has a weight's columns in another order."""
        return self.turned is not None and ours.endswith(".attn.out.weight")

    def pieces(self, name: str, ours: str, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yields parts of such rows, each with the number of its first row in a tensor of the file."""
        groups, parts = self.groups(name), self.parts[name]
        sizes = [self.names.ours[part][0] // groups for part in parts]
        for number, piece in enumerate(rows.split(len(rows) // groups)):
            yield number * sum(sizes) + sum(sizes[: parts.index(ours)]), piece

    def ours(self, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Returns the parameters of ours that a tensor (rows, ...) of the file holds; `read` returns a tensor by name.

        One that lies in two tensors comes with the second.
        """
        if names := split_names(self.parts[name][0]):
            return {self.parts[name][0]: joined(*map(read, names))} if name == names[-1] else {}
        rows = read(name)
        rows = rows.flatten(0, 1) if of_expert(self.parts[name][0]) else rows
        rows = rows.flatten() if self.mamba is not None and shape_of(name, self.mamba) else rows
        groups, parts = self.groups(name), self.parts[name]
        given = rows.unflatten(0, (groups, -1)).split([self.names.ours[part][0] // groups for part in parts], 1)
        return {part: self._ours(part, own.flatten(0, 1)) for part, own in zip(parts, given, strict=True)}

    def _ours(self, part: str, rows: Tensor) -> Tensor:
        """Returns the rows of one of our parameters, from those in the file's order."""
        if self.turned is not None:
            rows = rows_in_turn(part, rows, self.turned, back=True)
        if part.endswith(".attn.conv.weight"):
            return rows.unsqueeze(1)
        return rows_in_halves(rows, self.config.head_dim) if self._deals_out(part) else rows

    def computed(self, name: str, values: Tensor) -> Tensor:
        """Returns what a tensor of the file holds for our numbers (rows, in), or for A (r, in) of a low-rank update.

        What is not a copy of ours is in float32.
        """
        added = self._added(name)
        return values.float() + added if added else computed(name, values, self.turned)

    def restored(self, name: str, values: Tensor) -> Tensor:
        """Returns our numbers for those that a tensor of the file holds, in any of its rows."""
        added = self._added(name)
        return values - added if added else restored(name, values, self.turned)

    def _added(self, name: str) -> float:
        """Returns what a tensor of the file has added to ours."""
        return self.gguf.norms if name.endswith("norm.weight") and not name.endswith("ssm_norm.weight") else 0.0

    def rope_divisors(self) -> dict[str, Tensor]:
        """Returns tensors of the file: what the rotary frequencies are divided by, if each by another number."""
        rope = self.config.main_rope
        scaling = None if rope is None else rope.scaling
        if scaling is not None and scaling.kind == "proportional":
            return {DIVISORS: divisors(self.config)}
        if scaling is not None and scaling.kind == "longrope":
            given = dict(zip(LONGROPE, (scaling.short_factors, scaling.long_factors), strict=True))
            return {name: torch.tensor(factors) for name, factors in given.items()}
        if scaling is None or scaling.kind != "llama3":
            return {}
        plain, scaled = (
            rope_frequencies(self.config.rotary_size, rope.theta, how, torch.device("cpu")) for how in (None, scaling)
        )
        return {DIVISORS: plain / scaled}

    def _deals_out(self, ours: str) -> bool:
        return self.gguf.pairs and ours.split(".")[-2] in ("q", "k")


def known_family(names: NameMap) -> Gguf:
    """Returns how llama.cpp has a model's family; raises if it does not compute what the model does."""
    known = getattr(family(names.family), "GGUF", None)
    if known is None:
        have = ", ".join(name for name in FAMILIES if hasattr(family(name), "GGUF"))
        raise ConfigError(f"{names.family} is not written as GGUF; {have} are", where="to", hint=HINT)
    known = known.of(names.config)
    if why := known.refuses(names.config):
        raise ConfigError(f"not written as GGUF: {why}", where="to", hint=HINT)
    free = SAID | {field for field, _ in map(known.key, known.keys)}
    for one in fields(ModelConfig):
        value, fine = getattr(names.config, one.name), allowed(known, names.config, one.name)
        if (one.name in known.graph or one.name not in free) and value not in fine:
            said = f"{one.name} {' or '.join(map(str, fine))}, and this model has {value}"
            said = "windows and positions in other layers" if one.name == "layers" else said
            spelt = {field.name for field in fields(family(names.family).Keys)} | {"head_dim"}
            keys = ", ".join(key for key in DECIDED_BY.get(one.name, ()) if key in spelt)
            what = f"llama.cpp's {known.arch} computes with {said}" + (f" (config.json: {keys})" if keys else "")
            raise ConfigError(what, where="to", hint=HINT)
    check_rope(names.config, known)
    return known


def check_rope(config: ModelConfig, known: Gguf) -> None:
    """Raises unless llama.cpp can rotate as this model does."""
    ropes = {layer.rope for layer in map(config.layer, range(config.n_layers)) if layer.rope is not None}
    kinds = {rope.scaling.kind for rope in ropes if rope.scaling is not None}
    for kind, archs in SCALED_IN.items():
        if kind in kinds and known.arch not in archs:
            only = (
                f"llama.cpp has it for {', '.join(archs)} and not for {known.arch}" if archs else "llama.cpp has none"
            )
            raise ConfigError(f"rope scaling {kind} is not written as GGUF: {only}", where="to", hint=HINT)
    if "yarn" in kinds and len(ropes) > 1 and known.arch not in PLAIN_WINDOWS:
        what = "rope scaling yarn of some layers only is not written as GGUF: llama.cpp scales all alike"
        raise ConfigError(what, where="to", hint=HINT)
    if known.yarn_truncates and any(rope.scaling is not None and not rope.scaling.truncate for rope in ropes):
        what = "yarn with truncate false is not written as GGUF: llama.cpp rounds its bounds to whole dimensions"
        raise ConfigError(what, where="to", hint=HINT)


def of_expert(ours: str) -> str | None:
    """Returns the tensor of an expert's parameter, or of a head's own norm, with all others' on it; else None."""
    module, numbers, leaf = split_name(ours)
    if len(numbers) < 2:
        return None
    *_, owner, _, last = module.split(".")
    return f"blk.{numbers[0]}." + (f"attn_{owner}.{leaf}" if last == "{}" else f"ffn_{last}_exps.{leaf}")


def allowed(known: Gguf, config: ModelConfig, name: str) -> tuple[Any, ...]:
    """Returns the values of a field of ModelConfig that llama.cpp computes with, if the header does not say it."""
    default = next(field.default for field in fields(ModelConfig) if field.name == name)
    values = known.graph.get(name, (default,))
    return values(config) if callable(values) else values


def rows_dealt_out(rows: Tensor, head_dim: int) -> Tensor:
    """Returns q or k (heads * D, ...) with each head's rows a0 a1 … b0 b1 … reordered to a0 b0 a1 b1 …."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rows_in_halves(values: Tensor, head_dim: int) -> Tensor:
    """Returns q or k (heads * D, ...) with each head's rows a0 b0 a1 b1 … reordered to a0 a1 … b0 b1 …."""
    heads = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return heads.swapaxes(1, 2).reshape(values.shape)
