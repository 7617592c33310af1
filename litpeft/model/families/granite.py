"""Granite: LLaMA with factors on embeddings, scores, logits and what each sub-layer adds."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES
GGUF = Gguf(
    "granite",
    pairs=True,
    keys={
        "attention.scale": "score_scale",
        "embedding_scale": "embed_scale",
        "residual_scale": "residual_scale",
        "logit_scale": ("logit_scale", lambda scale: 1 / scale),
    },
    graph=llama.GGUF.graph,
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GraniteConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    residual_multiplier: float | int = 1.0
    attention_multiplier: float | int = 1.0


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GraniteForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, **scales(keys))


SCALES = ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier")


def scales(keys: Any) -> dict[str, float]:
    """Returns the factors of both generations."""
    return {
        "embed_scale": float(keys.embedding_multiplier),
        "residual_scale": float(keys.residual_multiplier),
        "score_scale": float(keys.attention_multiplier),
        "logit_scale": 1 / keys.logits_scaling,
    }
