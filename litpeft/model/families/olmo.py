"""OLMo 1: LLaMA with layer norms that have no parameters, and perhaps queries, keys and values of limited size."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES
GGUF = Gguf(
    "olmo",
    pairs=True,
    keys={"attention.clamp_kqv": "clip_qkv"},
    graph={"norm": ("layer_plain",), "head_dim": usual_heads},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' OlmoConfig, beside the rotary positions."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of OlmoForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, norm="layer_plain", clip_qkv=keys.clip_qkv)
