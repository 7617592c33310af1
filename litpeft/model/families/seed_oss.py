"""Seed-OSS 36B: LLaMA with biases on queries, keys and values, and perhaps one on what attention adds.

The dropout that its config.json may name (attention_dropout, residual_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES
GGUF = Gguf("seed_oss", graph={"qkv_bias": llama.EITHER})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' SeedOssConfig, beside the rotary positions."""

    vocab_size: int = 155136
    hidden_size: int = 4096
    intermediate_size: int = 27648
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    num_key_value_heads: int | None = 8
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 524288
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    attention_out_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = 128


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of SeedOssForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, output_bias=keys.attention_out_bias)
