"""The architecture of a model, read from the config.json of a Hugging Face folder. No table of sizes, no torch."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from litpeft.core.typed import later
from litpeft.model.parts import (
    ClampedGate,
    Experts,
    Latent,
    Layer,
    LayerInputs,
    QueryGrowth,
    Rope,
    RopeScaling,
    linear_of,
)

ACTIVATIONS = {  # name in config.json -> name in gpt.py
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
LARGEST = (1 << 31) - 1  # whole number that a key may hold


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
    norm: Literal["rms", "rms_1p", "layer", "layer_1p", "layer_no_bias", "layer_plain"] = "rms"
    # 1p: the files hold weight - 1; layer has a bias, unless it says no_bias; plain: neither weight nor bias
    norm_eps: float = 1e-5
    rotary_dim: int | None = None  # so many first dimensions of a head rotate; None = all, 0 = none
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    learned_positions: bool = False  # a table of max_positions vectors, one added to each token's embedding
    tie_embeddings: bool = False
    activation: Literal["silu", "relu", "relu2", "gelu", "gelu_tanh", "xielu"] = "silu"
    gated_mlp: bool = True  # down(act(gate(x)) * up(x)), else down(act(up(x)))
    parallel_residual: bool = False  # the MLP reads the block's input, as attention does, not the sum after attention
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    experts: Experts | None = None
    clamped_gate: ClampedGate | None = None  # in place of act(g) * u
    sinks: bool = False  # each query head has a score of its own for no token at all
    window: int | None = None  # a token sees this many tokens back, itself included; None = all
    layers: tuple[Layer, ...] = ()  # each one's window and rotary positions, in place of the fields; () = all are alike
    norms: Literal["before", "after", "around"] = "before"  # where the norms of a sub-layer stand; around = both
    shared_norm: bool = False  # one norm, whose output both attention and the MLP read
    qk_norm: Literal["head", "each", "own", "all", "rotated"] | None = None  # see make_qk_norm in norms.py
    value_norm: bool = False  # the values of each head are divided by their root mean square
    rope_pairs: bool = False  # dimensions 2 i and 2 i + 1 rotate together, not i and i + R / 2
    clip_qkv: float | None = None  # queries, keys and values are clamped to this size
    score_scale: float | None = None  # what scores are multiplied by; None = head_dim ** -0.5
    query_growth: QueryGrowth | None = None
    score_cap: float | None = None  # scores s become cap * tanh(s / cap)
    embed_scale: float = 1.0  # what embeddings are multiplied by
    residual_scale: float = 1.0  # and what a sub-layer adds to its input
    logit_scale: float = 1.0  # and the logits
    logit_cap: float | None = None  # logits l become cap * tanh(l / cap), after logit_scale
    latent: Latent | None = None
    gated_attention: bool = later(False)  # what attention returns is multiplied by the sigmoid of a gate, head by head
    mlp_scales: tuple[float, float] | None = later(None)  # of what the gate's activation reads, and the MLP returns
    layer_inputs: LayerInputs | None = None
    layer_scale: bool = False  # a layer's output is multiplied by a number of its own

    def __post_init__(self) -> None:
        if self.layers and len(self.layers) != self.n_layers:
            raise ValueError(f"{len(self.layers)} layers are described, num_hidden_layers says {self.n_layers}")
        if self.n_heads % self.n_kv_heads:
            what = f"num_attention_heads {self.n_heads} is no multiple of num_key_value_heads {self.n_kv_heads}"
            raise ValueError(what)
        for number, layer in enumerate(self.layers):
            if (layer.head_dim or 0) % 2 or self.n_heads % self.kv_heads(layer):
                what = f"layer {number} must have an even head_dim and as many key heads as divide {self.n_heads}"
                keys = "global_head_dim, num_global_key_value_heads, per_layer_config"
                raise ValueError(f"{what}; it has {layer.head_dim} and {layer.n_kv_heads} ({keys})")
        if self.rotary_size % 2 or not 0 <= self.rotary_size <= self.head_dim:
            what = f"the rotary part of a head (partial_rotary_factor or rotary_pct of head_dim {self.head_dim})"
            origin = f"head_dim is hidden_size {self.d_model} / num_attention_heads {self.n_heads} unless it is given"
            raise ValueError(f"{what} must be even and no larger than the head, got {self.rotary_size}; {origin}")

        ropes = [layer.rope for layer in self.layers] or [Rope(self.rope_theta, self.rope_scaling)]
        for scaling in {rope.scaling for rope in ropes if rope is not None and rope.scaling is not None}:
            sizes = [len(scaling.short_factors), len(scaling.long_factors)]
            if scaling.kind == "longrope" and sizes != [self.rotary_size // 2] * 2:
                what = f"short_factor and long_factor must have {self.rotary_size // 2} numbers each"
                origin = "half of what rotates of a head (partial_rotary_factor of hidden_size / num_attention_heads)"
                raise ValueError(f"{what}, {origin}; they have {sizes[0]} and {sizes[1]}")

    @property
    def rotary_size(self) -> int:
        """Returns how many dimensions of a head rotate."""
        return self.rotary_of(Layer())

    def rotary_of(self, layer: Layer) -> int:
        """Returns how many dimensions of a layer's heads rotate."""
        if self.latent is not None:
            return self.latent.turning
        return self.head_size(layer) if self.rotary_dim is None else self.rotary_dim

    def head_size(self, layer: Layer) -> int:
        """Returns the size of a layer's heads."""
        return layer.head_dim or self.head_dim

    def kv_heads(self, layer: Layer) -> int:
        """Returns how many key/value heads a layer has."""
        return self.n_heads if self.latent is not None else layer.n_kv_heads or self.n_kv_heads

    @property
    def linear_key_heads(self) -> int:
        """Returns how many key heads the layers with linear attention have."""
        return linear_of(self.layers).key_heads

    def layer(self, number: int) -> Layer:
        """Returns what a layer has of its own, or what all have."""
        return self.layers[number] if self.layers else Layer(self.window, Rope(self.rope_theta, self.rope_scaling))

    @property
    def main_rope(self) -> Rope | None:
        """Returns the rotary positions of a layer that sees all tokens, or of any if there is none."""
        layers = [layer for layer in map(self.layer, range(self.n_layers)) if layer.rope is not None]
        return min(layers, key=lambda layer: layer.window is not None, default=Layer()).rope

    @property
    def turning_length(self) -> int | None:
        """Returns the length of a text beyond which the rotary frequencies change, if they do."""
        ropes = [layer.rope for layer in {self.layer(number) for number in range(self.n_layers)}]
        scalings = [rope.scaling for rope in ropes if rope is not None and rope.scaling is not None]
        return min((scaling.original_positions for scaling in scalings if scaling.by_length), default=None)

    def with_layers(self, layers: Iterable[Layer]) -> "ModelConfig":
        """Returns the config with these layers; if they are all alike, in the fields for all of them."""
        layers = tuple(layers)
        first = layers[0]
        if len(set(layers)) > 1 or first.rope is None or first != Layer(first.window, first.rope):
            return replace(self, layers=layers)
        return replace(self, window=first.window, rope_theta=first.rope.theta, rope_scaling=first.rope.scaling)

    def has_experts(self, layer: int) -> bool:
        """Returns whether a layer has a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


K = TypeVar("K", bound="ConfigKeys")
OR_ZERO = {"zero": "allowed"}


def or_zero(default: int) -> Any:
    """Returns a field of ConfigKeys for a whole number that may be 0."""
    return field(default=default, metadata=OR_ZERO)


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
        zero = {one.name for one in fields(cls) if one.metadata == OR_ZERO}
        given = [(key, name, hf[name], kind) for key, name, kind in cls.spelt(hf) if name in hf]
        is_zero = lambda key, value: key in zero and type(value) is int and value == 0
        kept = {key: value for key, _, value, _ in given if is_zero(key, value)}
        return cls(**kept, **{key: checked(name, value, kind) for key, name, value, kind in given if key not in kept})

    @classmethod
    def spelt(cls, hf: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
        """Returns each field with the name that this config.json has for it, and its type."""
        names = {field: alias for alias, field in cls.ALIASES.items() if alias in hf}
        return [(one.name, names.get(one.name, one.name), one.type) for one in fields(cls)]


def checked(name: str, value: Any, kind: Any) -> Any:
    """Returns the value of the key `name` if it is of its kind: `float`, `int | None`, `Literal[True]`, ..."""
    kinds = (kind,) if get_origin(kind) is list else get_args(kind) or (kind,)
    if any(_fits(value, one) for one in kinds):
        return float(value) if kind is float else value
    allowed = " or ".join(KINDS.get(one) or json.dumps(one) for one in kinds)
    raise ValueError(f"{name} {json.dumps(value)[:80]} is not supported; it must be {allowed}")


KINDS = {
    int: f"a whole number from 1 to {LARGEST}",
    float: "a number above 0",
    bool: "true or false",
    str: "a name",
    dict: "an object",
    list[str]: "a list of names",
    list[int]: "a list of whole numbers",
    list[float]: "a list of numbers",
    NoneType: "null",
}


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether a value of a JSON file is of a type, or is a literal."""
    if kind is int:
        return type(value) is int and 1 <= value <= LARGEST
    if kind is float:
        return type(value) in (int, float) and 0 < value <= sys.float_info.max
    if get_origin(kind) is list:
        return type(value) is list and value != [] and all(type(item) is get_args(kind)[0] for item in value)
    return type(value) is kind if isinstance(kind, type) else type(value) is type(kind) and value == kind
