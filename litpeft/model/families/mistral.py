"""Mistral: LLaMA without biases and with a sliding window."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ConfigKeys, ModelConfig
from litpeft.model.families import llama

NAMES = llama.NAMES
BUFFERS = llama.BUFFERS
GGUF = llama.GGUF


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' MistralConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    sliding_window: int | None = 4096
    layer_types: None = None  # transformers takes a config.json with this key for Ministral's


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of MistralForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, window=keys.sliding_window)
