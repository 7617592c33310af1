"""Qwen3.5's text models, without experts: of four layers three have linear attention, and the fourth has a gate.

The position of a text's token is one number: what the positions of images have of their own (`mrope_section`) does not
matter. The layers for several tokens at once (`mtp`) are left out, as in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf, Place, llama
from litpeft.model.parts import Layer, LinearAttention, Rope, linear_of
from litpeft.model.rope import FULL

LINEAR = "linear_attention"
QUERY, QKV = Place("model.layers.{}.self_attn.q_proj", per="n_heads"), Place("model.layers.{}.linear_attn.in_proj_qkv")
NAMES = llama.NAMES | {
    "blocks.{}.attn.q": QUERY,
    "blocks.{}.attn.gate": QUERY,
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.attn": "model.layers.{}.linear_attn",  # A_log and dt_bias
    "blocks.{}.attn.in_q": QKV,
    "blocks.{}.attn.in_k": QKV,
    "blocks.{}.attn.in_v": QKV,
    "blocks.{}.attn.in_z": "model.layers.{}.linear_attn.in_proj_z",
    "blocks.{}.attn.in_b": "model.layers.{}.linear_attn.in_proj_b",
    "blocks.{}.attn.in_a": "model.layers.{}.linear_attn.in_proj_a",
    "blocks.{}.attn.conv": "model.layers.{}.linear_attn.conv1d",
    "blocks.{}.attn.norm": "model.layers.{}.linear_attn.norm",
    "blocks.{}.attn.out": "model.layers.{}.linear_attn.out_proj",
}
BUFFERS = ("mtp.*",)


def interval(layers: tuple[Layer, ...]) -> int:
    """Returns the number of the first layer that sees all tokens, counted from 1; 0 if there is none."""
    return next((number for number, layer in enumerate(layers, 1) if layer.linear is None), 0)


def sections(rotary: int) -> list[int]:
    """Returns how many frequencies turn by each of a position's numbers, which are dealt out in turn."""
    return [(rotary // 2 + 2 - at) // 3 for at in range(3)] + [0]


def no_gguf(config: ModelConfig) -> str | None:
    """Returns what llama.cpp does not compute."""
    every = interval(config.layers)
    if every < 2 or in_turn(config.n_layers, every) != [LINEAR if one.linear else FULL for one in config.layers]:
        return "llama.cpp has full attention in every n-th layer, n from 2 (config.json: layer_types)"
    sizes = linear_of(config.layers)
    if sizes.key_size != sizes.value_size:
        keys = f"linear_key_head_dim {sizes.key_size} and linear_value_head_dim {sizes.value_size}"
        return f"{keys} differ, and llama.cpp has one size for both"
    return None


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys of config.json whose values a GGUF file says otherwise."""
    count, every = header.number("block_count", int), header.number("full_attention_interval", int, 4)
    heads, inner = header.number("ssm.time_step_rank", int), header.number("ssm.inner_size", int)
    types, recurrent = in_turn(count, every), header.own.get("attention.recurrent_layers")
    if isinstance(recurrent, list):  # it has the layers for further tokens, too
        types = [LINEAR if one else FULL for one in recurrent[:count]]
    return {"layer_types": types, "linear_value_head_dim": inner // heads}


GGUF = Gguf(
    "qwen35",
    norms=1.0,
    values_in_turn=True,
    refuses=no_gguf,
    implied=implied,
    keys={
        "rope.dimension_count": "rotary_dim",
        "rope.dimension_sections": ("rotary_dim", sections),
        "full_attention_interval": ("layers", interval),
        "ssm.conv_kernel": ("layers", lambda layers: linear_of(layers).width),
        "ssm.state_size": ("layers", lambda layers: linear_of(layers).key_size),
        "ssm.group_count": ("layers", lambda layers: linear_of(layers).key_heads),
        "ssm.time_step_rank": ("layers", lambda layers: linear_of(layers).heads),
        "ssm.inner_size": ("layers", lambda layers: linear_of(layers).heads * linear_of(layers).value_size),
    },
    graph={
        "norm": ("rms_1p",),
        "norm_eps": (1e-6,),  # llama.cpp takes it for the lengths of queries and keys, too
        "qk_norm": ("head",),
        "gated_attention": (True,),
    },
)


@dataclass(frozen=True)
class HybridKeys(ConfigKeys):
    """The keys that the classes of Qwen3.5 and Qwen3-Next have alike."""

    num_attention_heads: int = 16
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    head_dim: int = 256
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    layer_types: list[str] | None = None


@dataclass(frozen=True)
class Keys(HybridKeys):
    """What decides the logits of transformers' Qwen3_5TextConfig, beside the rotary positions."""

    vocab_size: int = 248320
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 32
    num_key_value_heads: int = 4


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3_5ForCausalLM describes."""
    return hybrid(Keys.read(hf), hf)


def hybrid(keys: HybridKeys, hf: Mapping[str, Any], **switches: Any) -> ModelConfig:
    """Returns the ModelConfig of keys that are named as Qwen3.5's; `switches` as in `llama.usual`."""
    config = llama.usual(keys, hf, share=0.25, norm="rms_1p", qk_norm="head", gated_attention=True, **switches)
    heads = keys.linear_num_key_heads, keys.linear_num_value_heads
    sizes = keys.linear_key_head_dim, keys.linear_value_head_dim, keys.linear_conv_kernel_dim
    linear = Layer(linear=LinearAttention(*heads, *sizes))
    full = Layer(rope=Rope(config.rope_theta, config.rope_scaling))
    types = keys.layer_types or usual_types(config.n_layers, hf)
    if len(types) != config.n_layers:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers says {config.n_layers}")
    if strange := [kind for kind in types if kind not in (FULL, LINEAR)]:
        raise ValueError(f"layer_types {strange[0]!r} is not supported; it must be {FULL!r} or {LINEAR!r}")
    return config.with_layers(linear if kind == LINEAR else full for kind in types)


def usual_types(count: int, hf: Mapping[str, Any]) -> list[str]:
    """Returns the layers of a config.json that does not list them."""
    every = checked("full_attention_interval", hf.get("full_attention_interval", 4), int)
    if count > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {count} is not supported")
    return in_turn(count, every)


def in_turn(count: int, every: int) -> list[str]:
    """Returns the kinds of so many layers, of which every so many-th sees all tokens."""
    return [LINEAR if (layer + 1) % every else FULL for layer in range(count)]
