"""Qwen3, without its mixtures of experts: Qwen2 with a norm on the queries and keys of each head."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama
from litpeft.model.families.qwen2 import with_windows

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
}
GGUF = Gguf("qwen3", graph={"qk_norm": ("head",)})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen3Config, beside the rotary positions."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    head_dim: int = 128
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3ForCausalLM describes."""
    keys = Keys.read(hf)
    return with_windows(keys, llama.usual(keys, hf, qk_norm="head"))
