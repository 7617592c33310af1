"""LLaMA and models of its architecture: Llama 2 and 3, SmolLM2, TinyLlama.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ConfigKeys, ModelConfig, rope_settings

NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.o": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
BUFFERS = ("*.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' LlamaConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of LlamaForCausalLM describes."""
    keys = Keys.read(hf)
    width, heads = keys.hidden_size, keys.num_attention_heads
    if keys.head_dim is None and width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}, and there is no head_dim")
    theta, share, scaling = rope_settings(hf, keys.max_position_embeddings)
    if scaling is not None and share != 1:  # without a scaling the class ignores it
        raise ValueError(f"partial_rotary_factor {share} with rope_type {scaling.kind} is not supported; only 1 is")
    return ModelConfig(
        vocab_size=keys.vocab_size,
        d_model=width,
        n_layers=keys.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=keys.num_key_value_heads or heads,
        head_dim=keys.head_dim or width // heads,
        d_ff=keys.intermediate_size,
        max_positions=keys.max_position_embeddings,
        norm_eps=keys.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=keys.tie_word_embeddings,
        qkv_bias=keys.attention_bias,
        output_bias=keys.attention_bias,
        mlp_bias=keys.mlp_bias,
    )
