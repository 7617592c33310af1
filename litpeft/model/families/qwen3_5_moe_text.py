"""Qwen3.5's text models with experts: as those without, with experts in each layer, and a shared one behind a gate.

The router's extra loss (router_aux_loss_coef) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any

from litpeft.model import families
from litpeft.model.config import Experts, ModelConfig
from litpeft.model.families import in_all_layers, qwen3_5_text
from litpeft.model.families.qwen2_moe import SHARED
from litpeft.model.families.qwen3_moe import EXPERTS

NAMES = qwen3_5_text.NAMES | EXPERTS | SHARED
BUFFERS = qwen3_5_text.BUFFERS
GGUF = replace(
    qwen3_5_text.GGUF,
    arch="qwen35moe",
    keys=qwen3_5_text.GGUF.keys | families.EXPERTS | families.OWN_SIZE | families.SHARED_SIZE,
    graph=qwen3_5_text.GGUF.graph | {"experts": in_all_layers(normed=True)},
)


@dataclass(frozen=True)
class Keys(qwen3_5_text.HybridKeys):
    """What decides the logits of transformers' Qwen3_5MoeTextConfig, beside the rotary positions."""

    vocab_size: int = 248320
    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_key_value_heads: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 8
    num_experts: int = 256


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3_5MoeForCausalLM describes."""
    keys = Keys.read(hf)
    sizes = keys.num_experts, keys.num_experts_per_tok, keys.moe_intermediate_size
    shared = keys.shared_expert_intermediate_size
    experts = Experts(*sizes, normed=True, shared_d_ff=shared, shared_gate=True)
    return replace(qwen3_5_text.hybrid(keys, hf, d_ff=keys.moe_intermediate_size), experts=experts)
