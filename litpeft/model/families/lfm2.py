"""Liquid's LFM2: a short convolution in most layers, attention with norms of queries and keys in the others."""

from dataclasses import dataclass
from typing import Any

from litpeft.model.config import ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, Place, llama, without
from litpeft.model.parts import Convolution, Layer, Rope
from litpeft.model.rope import FULL

CONV = "conv"
IN = Place("model.layers.{}.conv.in_proj")
NAMES = without(llama.NAMES, "*norm*") | {
    "blocks.{}.norm1": "model.layers.{}.operator_norm",
    "blocks.{}.norm2": "model.layers.{}.ffn_norm",
    "blocks.{}.attn.o": "model.layers.{}.self_attn.out_proj",
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_layernorm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_layernorm",
    "blocks.{}.attn.in_b": IN,
    "blocks.{}.attn.in_c": IN,
    "blocks.{}.attn.in_x": IN,
    "blocks.{}.attn.conv": "model.layers.{}.conv.conv",
    "blocks.{}.attn.out": "model.layers.{}.conv.out_proj",
    "blocks.{}.mlp.gate": "model.layers.{}.feed_forward.w1",
    "blocks.{}.mlp.up": "model.layers.{}.feed_forward.w3",
    "blocks.{}.mlp.down": "model.layers.{}.feed_forward.w2",
    "norm": "model.embedding_norm",
}


def no_gguf(config: ModelConfig) -> str | None:
    """Returns what llama.cpp does not compute."""
    convolutions = convolutions_of(config.layers)
    if not convolutions:
        return "llama.cpp has a convolution in some layers (config.json: layer_types)"
    return "llama.cpp's convolutions have no biases (config.json: conv_bias)" if convolutions[0].bias else None


def convolutions_of(layers: tuple[Layer, ...]) -> list[Convolution]:
    """Returns the convolution of each layer that has one."""
    return [layer.convolution for layer in layers if layer.convolution is not None]


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys of config.json whose values a GGUF file says otherwise."""
    count, heads = header.number("block_count", int), header.own.get("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * count
    return {"layer_types": [FULL if number else CONV for number in heads], "block_auto_adjust_ff_dim": False}


GGUF = Gguf(
    "lfm2",
    refuses=no_gguf,
    implied=implied,
    keys={
        "attention.head_count_kv": ("", lambda config: [config.n_kv_heads * layer.attends for layer in config.layers]),
        "shortconv.l_cache": ("layers", lambda layers: convolutions_of(layers)[0].width),
    },
    graph={"qk_norm": ("head",)},
)
OLDER = {
    "tie_word_embeddings": "tie_embedding",
    "intermediate_size": "block_ff_dim",
}  # key -> its other name, which wins


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Lfm2Config, beside the rotary positions."""

    vocab_size: int = 65536
    hidden_size: int = 2560
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 128000
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    conv_bias: bool = False
    conv_L_cache: int = 3
    block_multiple_of: int = 256
    block_ffn_dim_multiplier: float | int = 1.0
    block_auto_adjust_ff_dim: bool = True
    full_attn_idxs: list[int] | None = None
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Lfm2ForCausalLM describes."""
    keys = Keys.read(hf | {new: hf[old] for new, old in OLDER.items() if old in hf})
    sizes = {"d_ff": inner_size(keys), "norm_eps": keys.norm_eps}
    config = llama.usual(keys, hf, theta=1000000.0, qk_norm="head", **sizes)
    count = config.n_layers
    if count > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {count} is not supported")
    own = range(count) if keys.full_attn_idxs is None else keys.full_attn_idxs
    types = keys.layer_types or [FULL if layer in own else CONV for layer in range(count)]
    return with_convolutions(config, keys, types)


def with_convolutions(config: ModelConfig, keys: Any, types: list[str]) -> ModelConfig:
    """Returns the config with layers of these types."""
    if len(types) != config.n_layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers says {config.n_layers}")
    full = Layer(rope=Rope(config.rope_theta, config.rope_scaling))
    conv = Layer(convolution=Convolution(keys.conv_L_cache, keys.conv_bias))
    return config.with_layers(conv if kind == CONV else full for kind in types)


def inner_size(keys: Keys) -> int:
    """Returns the inner size of an MLP: two thirds of what is said, times a factor, rounded up to a multiple."""
    if not keys.block_auto_adjust_ff_dim:
        return keys.intermediate_size
    size, multiple = int(2 * keys.intermediate_size / 3), keys.block_multiple_of
    size = int(keys.block_ffn_dim_multiplier * size)
    return multiple * -(-size // multiple)
