"""Ministral of 2024: Mistral in which each layer may have the window or not."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama
from litpeft.model.rope import layers_of

NAMES = llama.NAMES
GGUF = Gguf("llama", pairs=True)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' MinistralConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of MinistralForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf)
    slides = lambda layer: keys.sliding_window is not None
    rope = config.layer(0).rope
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, rope))
