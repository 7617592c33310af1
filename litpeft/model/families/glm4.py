"""GLM-4 of 2025: GLM with norms around each sub-layer."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, glm, llama

NAMES = glm.NAMES | {
    "blocks.{}.post_norm1": "model.layers.{}.post_self_attn_layernorm",
    "blocks.{}.post_norm2": "model.layers.{}.post_mlp_layernorm",
}
GGUF = Gguf(
    "glm4",
    keys=glm.GGUF.keys,
    graph={"rope_pairs": (True,), "qkv_bias": llama.EITHER, "norms": ("around",)},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Glm4Config, beside the rotary positions."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 0.00000015625
    tie_word_embeddings: bool = False
    head_dim: int = 128
    attention_bias: bool = True


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Glm4ForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, share=0.5, rope_pairs=True, output_bias=False, norms="around")
