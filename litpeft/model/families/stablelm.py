"""StableLM: LLaMA with layer norms, of which a quarter of each head rotates.

The dropout that its config.json may name (hidden_dropout, attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm.norms.{}": "model.layers.{}.self_attn.q_layernorm.norms.{}",
    "blocks.{}.attn.k_norm.norms.{}": "model.layers.{}.self_attn.k_layernorm.norms.{}",
}
GGUF = Gguf(
    "stablelm",
    own_head=True,
    keys={"rope.dimension_count": "rotary_dim", "use_parallel_residual": "parallel_residual"},
    graph={"norm": ("layer",), "qkv_bias": llama.EITHER, "shared_norm": llama.EITHER, "qk_norm": (None, "own")},
    implied=lambda header: {"qk_layernorm": "blk.0.attn_q_norm.weight" in header.stored},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' StableLmConfig, beside the rotary positions."""

    vocab_size: int = 50304
    hidden_size: int = 2560
    intermediate_size: int = 6912
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1.0e-5
    tie_word_embeddings: bool = False
    use_qkv_bias: bool = False
    qk_layernorm: bool = False  # each head has a norm of its own
    use_parallel_residual: bool = False
    head_dim: None = None  # no key of the class, but its rotary positions would use it and its attention would not


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of StableLmForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(
        keys,
        hf,
        share=0.25,
        norm="layer",
        norm_eps=keys.layer_norm_eps,
        qkv_bias=keys.use_qkv_bias,
        qk_norm="own" if keys.qk_layernorm else None,
        parallel_residual=keys.use_parallel_residual,
        shared_norm=keys.use_parallel_residual,
    )
