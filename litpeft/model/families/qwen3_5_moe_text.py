"""Qwen3.5's text models with experts: as those without, with experts in each layer, and a shared one behind a gate.

The router's extra loss (router_aux_loss_coef) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ConfigKeys, Experts, ModelConfig
from litpeft.model.families import EXPERTS, OWN_SIZE, in_all_layers, qwen3_5_text, qwen3_moe

SHARED = {
    "blocks.{}.mlp.shared.gate": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blocks.{}.mlp.shared.up": "model.layers.{}.mlp.shared_expert.up_proj",
    "blocks.{}.mlp.shared.down": "model.layers.{}.mlp.shared_expert.down_proj",
    "blocks.{}.mlp.shared_gate": "model.layers.{}.mlp.shared_expert_gate",
}
NAMES = qwen3_5_text.NAMES | qwen3_moe.EXPERTS | SHARED
BUFFERS = qwen3_5_text.BUFFERS
SHARED_SIZE = {"expert_shared_feed_forward_length": ("experts", lambda experts: experts.shared_d_ff)}
GGUF = replace(
    qwen3_5_text.GGUF,
    arch="qwen35moe",
    keys=qwen3_5_text.GGUF.keys | EXPERTS | OWN_SIZE | SHARED_SIZE,
    graph=qwen3_5_text.GGUF.graph | {"experts": in_all_layers(normed=True)},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen3_5MoeTextConfig, beside the rotary positions."""

    vocab_size: int = 248320
    hidden_size: int = 2048
    num_hidden_layers: int = 40
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
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 8
    num_experts: int = 256
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3_5MoeForCausalLM describes."""
    keys = Keys.read(hf)
    sizes = keys.num_experts, keys.num_experts_per_tok, keys.moe_intermediate_size
    shared = keys.shared_expert_intermediate_size
    experts = Experts(*sizes, normed=True, shared_d_ff=shared, shared_gate=True)
    return replace(qwen3_5_text.hybrid(keys, hf, d_ff=keys.moe_intermediate_size), experts=experts)
