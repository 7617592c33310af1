"""Ministral 3: Mistral with yarn, whose queries grow with their position."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, QueryGrowth, checked
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES
GGUF = Gguf(
    "mistral3",
    pairs=True,
    yarn_multiplier=1.0,
    keys={"attention.temperature_scale": ("query_growth", lambda growth: growth and growth.rate)},
)
BETA = "llama_4_scaling_beta"
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    BETA: 0.1,
}


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Ministral3Config, beside the rotary positions."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 34
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    head_dim: int = 128
    sliding_window: int | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Ministral3ForCausalLM describes."""
    keys = Keys.read(hf)
    if hf.get("rope_parameters") is None:
        hf = hf | {"rope_parameters": ROPE}
    config = llama.usual(keys, hf, window=keys.sliding_window)
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rate = checked(f"{where}.{BETA}", hf[where].get(BETA), float | None)
    if rate is None or config.rope_scaling is None:
        return config
    return replace(config, query_growth=QueryGrowth(rate, config.rope_scaling.original_positions))
