"""Gemma 3, its text models: Gemma 2 without its cap on scores, with norms of queries and keys, and two kinds of layers.

Layers with a window rotate at another theta than those without.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf, alternating, gemma, gemma2, llama, window_of
from litpeft.model.rope import FULL, SLIDING, layers_of, rope_by_type, without_rope

NAMES = gemma2.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
}
THETAS = {FULL: ("rope_theta", 1_000_000.0), SLIDING: ("rope_local_base_freq", 10_000.0)}


def layers(config: ModelConfig) -> tuple[Any, ...]:
    """Returns the layers that llama.cpp builds: those with a window rotate at their own theta, without a scaling."""
    scaled = any(layer.window is not None and layer.rope.scaling is not None for layer in config.layers)
    return ((),) if scaled else alternating(config, 6)


GGUF = Gguf(
    "gemma3",
    norms=1.0,
    keys={
        "attention.sliding_window": ("layers", window_of),
        "rope.freq_base_swa": ("layers", lambda layers: next((one.rope.theta for one in layers if one.window), None)),
    },
    graph={
        **gemma.GGUF.graph,
        "norms": ("around",),
        "qk_norm": ("head",),
        "score_scale": lambda config: gemma2.score_scales(config, 62),
        "layers": layers,
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Gemma3TextConfig, beside the rotary positions."""

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    hidden_activation: Literal[tuple(ACTIVATIONS)] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    head_dim: int = 256
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None
    attn_logit_softcapping: Literal[None] = None  # some of transformers' kernels cap scores, some do not
    use_bidirectional_attention: Literal[False, None] = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Gemma3ForCausalLM describes."""
    keys = Keys.read(hf)
    ropes = rope_by_type(hf, keys.max_position_embeddings, THETAS)
    config = llama.usual(keys, without_rope(hf), qk_norm="head", **gemma2.switches(keys))
    every = checked("sliding_window_pattern", hf.get("sliding_window_pattern", 6), int)
    slides = lambda layer: (layer + 1) % every != 0
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, ropes))
