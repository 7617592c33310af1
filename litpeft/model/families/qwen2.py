"""Qwen2 and Qwen2.5: LLaMA with a bias on q, k and v, and perhaps a window in the last layers."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads
from litpeft.model.rope import layers_of

NAMES = llama.NAMES
GGUF = Gguf("qwen2", graph={"qkv_bias": (True,), "head_dim": usual_heads})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen2Config, beside the rotary positions."""

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
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen2ForCausalLM describes."""
    keys = Keys.read(hf)
    return with_windows(keys, llama.usual(keys, hf, qkv_bias=True))


def with_windows(keys: Any, config: ModelConfig) -> ModelConfig:
    """Returns the config with the windows that Qwen's keys describe."""
    window = keys.sliding_window if keys.use_sliding_window else None
    slides = lambda layer: window is not None and layer >= keys.max_window_layers
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, window, config.layer(0).rope))
