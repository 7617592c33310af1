"""Cohere's Command A and R7B: Command R in which three of four layers have a window, and the others no positions."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf, alternating, cohere, llama, window_of
from litpeft.model.rope import layers_of

NAMES = llama.NAMES


def layers(config: ModelConfig) -> tuple[Any, ...]:
    """Returns the layers that llama.cpp builds: some have a window, and the others no positions."""
    return alternating(config, 4)[1:] if config.layers else ()


GGUF = Gguf(
    "cohere2",
    keys={**cohere.GGUF.keys, "attention.sliding_window": ("layers", window_of)},
    graph={**cohere.GGUF.graph, "qk_norm": (None,), "layers": layers},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Cohere2Config, beside the rotary positions."""

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    logit_scale: float = 0.0625
    attention_bias: bool = False
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Cohere2ForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf, **cohere.switches(keys))
    every = checked("sliding_window_pattern", hf.get("sliding_window_pattern", 4), int)
    slides = lambda layer: (layer + 1) % every != 0
    layers = layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, config.layer(0).rope)
    return config.with_layers(layer if layer.window else replace(layer, rope=None) for layer in layers)
