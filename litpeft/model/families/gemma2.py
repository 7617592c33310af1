"""Gemma 2: Gemma with norms around each sub-layer, caps on scores and logits, and a window in every other layer."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, alternating, gemma, llama, window_of
from litpeft.model.rope import layers_of

NAMES = llama.NAMES | {
    "blocks.{}.post_norm1": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.norm2": "model.layers.{}.pre_feedforward_layernorm",
    "blocks.{}.post_norm2": "model.layers.{}.post_feedforward_layernorm",
}


def score_scales(config: ModelConfig, most_layers: int) -> tuple[float]:
    """Returns what llama.cpp multiplies scores by. It knows the model of 27B, whose heads differ, by its layers."""
    size = config.d_model // config.n_heads if config.n_layers == most_layers else config.head_dim
    return (size**-0.5,)


CAPS = "attn_logit_softcapping and final_logit_softcapping must be numbers: without them llama.cpp takes 50 and 30"
GGUF = Gguf(
    "gemma2",
    refuses=lambda config: None if config.score_cap and config.logit_cap else CAPS,
    norms=1.0,
    keys={
        "attention.sliding_window": ("layers", window_of),
        "attn_logit_softcapping": "score_cap",
        "final_logit_softcapping": "logit_cap",
    },
    graph={
        **gemma.GGUF.graph,
        "norms": ("around",),
        "score_scale": lambda config: score_scales(config, 46),
        "layers": lambda config: alternating(config, 2),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Gemma2Config, beside the rotary positions."""

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    hidden_activation: Literal[tuple(ACTIVATIONS)] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    head_dim: int = 256
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0
    use_bidirectional_attention: Literal[False, None] = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Gemma2ForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf, score_cap=keys.attn_logit_softcapping, **switches(keys))
    slides = lambda layer: layer % 2 == 0
    rope = config.layer(0).rope
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, rope))


def switches(keys: Any) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 have beside Llama."""
    if keys.hidden_size % keys.num_attention_heads:
        what = f"hidden_size {keys.hidden_size} is no multiple of num_attention_heads {keys.num_attention_heads}"
        raise ValueError(what)
    return {
        "norm": "rms_1p",
        "norms": "around",
        "activation": ACTIVATIONS[keys.hidden_activation],
        "embed_scale": keys.hidden_size**0.5,
        "score_scale": keys.query_pre_attn_scalar**-0.5,
        "logit_cap": keys.final_logit_softcapping,
    }
