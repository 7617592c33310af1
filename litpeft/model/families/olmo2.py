"""OLMo 2: LLaMA with norms after each sub-layer, not before, and norms over all queries and keys of a token."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
    "blocks.{}.post_norm1": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.post_norm2": "model.layers.{}.post_feedforward_layernorm",
}
GGUF = Gguf("olmo2", own_head=True, graph={"norms": ("after",), "qk_norm": ("all",), "head_dim": usual_heads})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Olmo2Config, beside the rotary positions."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Olmo2ForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, norms="after", qk_norm="all")
