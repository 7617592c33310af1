"""Qwen3-Next: linear attention in three of four layers, and experts. Qwen3.5 has the same layers in other files.

The router's extra loss (router_aux_loss_coef) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any

from litpeft.model.config import Experts, ModelConfig
from litpeft.model.families import Place, qwen3_5_moe_text, qwen3_5_text
from litpeft.model.families.qwen3_moe import dense_layers, without_empty

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
class Keys(qwen3_5_text.HybridKeys):
    """What decides the logits of transformers' Qwen3NextConfig, beside the rotary positions."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 48
    num_key_value_heads: int = 2
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 10
    num_experts: int = 512
    norm_topk_prob: bool = True
    mlp_only_layers: list[int] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3NextForCausalLM describes."""
    keys = Keys.read(without_empty(hf))
    sizes = keys.num_experts, keys.num_experts_per_tok, keys.moe_intermediate_size
    shared = keys.shared_expert_intermediate_size
    experts = Experts(
        *sizes, keys.norm_topk_prob, dense_layers=dense_layers(keys), shared_d_ff=shared, shared_gate=True
    )
    return replace(qwen3_5_text.hybrid(keys, hf), experts=experts)
