"""Apertus of 8B and 70B: LLaMA with norms on the queries and keys of each head, and an MLP without a gate, of xIELU.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import llama, qwen3

NAMES = qwen3.NAMES | {
    "blocks.{}.norm1": "model.layers.{}.attention_layernorm",
    "blocks.{}.norm2": "model.layers.{}.feedforward_layernorm",
    "blocks.{}.mlp.act": "model.layers.{}.mlp.act_fn",
}
KNOWN = {"xielu": "xielu"} | ACTIVATIONS
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 12_000_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' ApertusConfig, beside the rotary positions."""

    vocab_size: int = 131072
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(KNOWN)] = "xielu"
    max_position_embeddings: int = 65536
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of ApertusForCausalLM describes."""
    keys = Keys.read(hf)
    if hf.get("rope_parameters") is None and not hf.get("rope_scaling"):
        hf = hf | {"rope_parameters": ROPE}
    activation = KNOWN[keys.hidden_act]
    return llama.usual(keys, hf, theta=12_000_000.0, qk_norm="head", gated_mlp=False, activation=activation)
