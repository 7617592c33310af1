"""ERNIE 4.5 of 0.3B, without the mixtures of experts: LLaMA whose heads rotate in pairs that lie side by side."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES
GGUF = Gguf("ernie4_5", graph={"rope_pairs": (True,)})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Ernie4_5Config, beside the rotary positions."""

    vocab_size: int = 103424
    hidden_size: int = 1024
    intermediate_size: int = 3072
    num_hidden_layers: int = 18
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 2
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-05
    tie_word_embeddings: bool = True
    use_bias: bool | None = False
    head_dim: int | None = 128


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Ernie4_5ForCausalLM describes."""
    keys = Keys.read(hf)
    bias = bool(keys.use_bias)
    return llama.usual(keys, hf, theta=500_000.0, rope_pairs=True, qkv_bias=bias, output_bias=bias, mlp_bias=bias)
