"""Qwen3-Next: linear attention in three of four layers, and experts. Qwen3.5 has the same layers in other files.

The router's extra loss (router_aux_loss_coef) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ConfigKeys, Experts, ModelConfig
from litpeft.model.families import Place, qwen3_5_moe_text, qwen3_5_text

QKVZ = Place("model.layers.{}.linear_attn.in_proj_qkvz", per="linear_key_heads")
BA = Place("model.layers.{}.linear_attn.in_proj_ba", per="linear_key_heads")
NAMES = (
    qwen3_5_moe_text.NAMES
    | {f"blocks.{{}}.attn.in_{leaf}": QKVZ for leaf in "qkvz"}
    | {f"blocks.{{}}.attn.in_{leaf}": BA for leaf in "ba"}
)
BUFFERS = qwen3_5_text.BUFFERS
GGUF = replace(
    qwen3_5_moe_text.GGUF,
    arch="qwen3next",
    values_in_turn=False,
    keys={key: said for key, said in qwen3_5_moe_text.GGUF.keys.items() if key != "rope.dimension_sections"},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen3NextConfig, beside the rotary positions."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    head_dim: int = 256
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 10
    num_experts: int = 512
    norm_topk_prob: bool = True
    mlp_only_layers: list[int] | None = None
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3NextForCausalLM describes."""
    keys = Keys.read({key: value for key, value in hf.items() if (key, value) != ("mlp_only_layers", [])})
    config, dense = qwen3_5_text.hybrid(keys, hf), keys.mlp_only_layers or []
    rest = [layer for layer in range(config.n_layers) if layer in dense or (layer + 1) % keys.decoder_sparse_step]
    sizes = keys.num_experts, keys.num_experts_per_tok, keys.moe_intermediate_size
    shared = keys.shared_expert_intermediate_size
    experts = Experts(*sizes, keys.norm_topk_prob, dense_layers=tuple(rest), shared_d_ff=shared, shared_gate=True)
    return replace(config, experts=experts)
