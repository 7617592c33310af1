"""The architecture of a model, read from the config.json of a Hugging Face folder. No table of sizes, no torch."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args

ACTIVATIONS = {  # name in config.json -> name in gpt.py
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LARGEST = (1 << 31) - 1  # whole number that a key may hold


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched to reach beyond the length that the model was trained on."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder-only model; every field changes what gpt.py builds."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    norm: Literal["rms", "layer"] = "rms"  # layer has a bias
    norm_eps: float = 1e-5
    rotary_dim: int | None = None  # so many first dimensions of a head rotate; None = all, 0 = none
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    learned_positions: bool = False  # a table of max_positions vectors, one added to each token's embedding
    tie_embeddings: bool = False
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    parallel_residual: bool = False  # the MLP reads the block's input, as attention does, not the sum after attention
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # a token sees this many tokens back, itself included; None = all

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            what = f"num_attention_heads {self.n_heads} is no multiple of num_key_value_heads {self.n_kv_heads}"
            raise ValueError(what)
        if self.rotary_size % 2 or not 0 <= self.rotary_size <= self.head_dim:
            what = f"the rotary part of a head (partial_rotary_factor or rotary_pct of head_dim {self.head_dim})"
            origin = f"head_dim is hidden_size {self.d_model} / num_attention_heads {self.n_heads} unless it is given"
            raise ValueError(f"{what} must be even and no larger than the head, got {self.rotary_size}; {origin}")

    @property
    def rotary_size(self) -> int:
        """Returns how many dimensions of a head rotate."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim


K = TypeVar("K", bound="ConfigKeys")


@dataclass(frozen=True)
class ConfigKeys:
    """The keys of a config.json that decide the logits. Each family adds those of its class in transformers.

    Names, types and defaults are those of that class, and a key that has no field here is ignored, as it is there.
    `Literal` says that the class knows more values than litpeft.
    """

    is_causal: Literal[True] = True
    per_layer_config: None = None

    ALIASES: ClassVar[Mapping[str, str]] = {}  # other names of a field: as in transformers, they win

    @classmethod
    def read(cls: type[K], hf: Mapping[str, Any]) -> K:
        """Returns the keys of a config.json; one that it leaves out has its default."""
        return cls(**{field: checked(name, hf[name], kind) for field, name, kind in cls.spelt(hf) if name in hf})

    @classmethod
    def spelt(cls, hf: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Returns each field with the name that this config.json has for it, and its type."""
        names = {field: alias for alias, field in cls.ALIASES.items() if alias in hf}
        return [(field.name, names.get(field.name, field.name), field.type) for field in fields(cls)]


def checked(name: str, value: Any, kind: Any) -> Any:
    """Returns the value of the key `name` if it is of its kind: `float`, `int | None`, `Literal[True]`, ..."""
    kinds = get_args(kind) or (kind,)
    if any(_fits(value, one) for one in kinds):
        return float(value) if kind is float else value
    allowed = " or ".join(KINDS.get(one) or json.dumps(one) for one in kinds)
    raise ValueError(f"{name} {json.dumps(value)[:80]} is not supported; it must be {allowed}")


KINDS = {
    int: f"a whole number from 1 to {LARGEST}",
    float: "a number above 0",
    bool: "true or false",
    dict: "an object",
    NoneType: "null",
}


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether a value of a JSON file is of a type, or is a literal."""
    if kind is int:
        return type(value) is int and 1 <= value <= LARGEST
    if kind is float:
        return type(value) in (int, float) and 0 < value <= sys.float_info.max
    return type(value) is kind if isinstance(kind, type) else type(value) is type(kind) and value == kind


PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"


def rope_settings(
    hf: Mapping[str, Any],
    max_positions: int,
    theta: str = "rope_theta",
    share: str = "partial_rotary_factor",
    default_share: float = 1.0,
) -> tuple[float, float, RopeScaling | None]:
    """Returns theta, the share of a head that rotates, and the scaling.

    Of several keys for one value the one that transformers reads counts: the first of `rope_scaling` and
    `rope_parameters` that is not empty, and its keys before `theta` and `share`, older files' keys at the top level.
    """
    where = next((key for key in ("rope_scaling", "rope_parameters") if checked(key, hf.get(key), dict | None)), "")
    given = {field: (name, hf[name]) for field, name in (("rope_theta", theta), (PARTIAL, share)) if name in hf}
    given |= {key: (f"{where}.{key}", value) for key, value in (hf[where] if where else {}).items()}
    if nested := [name for name, value in given.values() if isinstance(value, dict)]:
        raise ValueError(f"{', '.join(nested)}: rotary positions that differ from layer to layer are not supported")

    def take(key: str, kind: Any, default: Any = None) -> Any:
        if key not in given and default is None:
            raise KeyError(f"{where}.{key}")
        return checked(*given.get(key, (key, default)), kind)

    base, part = take("rope_theta", float, 10000.0), take(PARTIAL, float, default_share)
    kind = take("rope_type" if "rope_type" in given else "type", Literal["default", "linear", "llama3"], "default")
    if kind == "default":
        return base, part, None
    factor = take("factor", float)
    if kind == "linear":
        return base, part, RopeScaling("linear", factor)
    low, high = take("low_freq_factor", float), take("high_freq_factor", float)
    if low >= high:
        raise ValueError(f"{where}.low_freq_factor {low} must be below high_freq_factor {high}")
    if ORIGINAL in hf:  # it wins over the one inside
        given[ORIGINAL] = (ORIGINAL, hf[ORIGINAL])
    return base, part, RopeScaling("llama3", factor, low, high, take(ORIGINAL, int, max_positions))


def interpolated(hf: dict[str, Any], factor: float) -> None:
    """Changes a config.json, in place: the model reads `factor` times as many tokens, at positions that much closer."""
    if factor == 1:
        return
    found = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    before = found.get("factor", 1.0) if found.get("rope_type", found.get("type")) == "linear" else 1.0
    scaled = {**found, "rope_type": "linear", "factor": before * factor}
    scaled.pop("type", None)
    hf["rope_scaling"], hf["rope_parameters"] = scaled, scaled  # for readers before transformers 5, and since
    hf["max_position_embeddings"] = int(hf["max_position_embeddings"] * factor)
