"""Qwen1.5-MoE and Qwen2's mixture of 57B: Qwen2 with experts, beside an MLP of all tokens that has a gate of its own.

The router's extra loss and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model import families
from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig, or_zero
from litpeft.model.families import Gguf, in_all_layers, llama, usual_heads
from litpeft.model.families.qwen3_moe import EXPERTS, dense_layers, without_empty
from litpeft.model.rope import layers_of

SHARED = {
    "blocks.{}.mlp.shared.gate": "model.layers.{}.mlp.shared_expert.gate_proj",
    "blocks.{}.mlp.shared.up": "model.layers.{}.mlp.shared_expert.up_proj",
    "blocks.{}.mlp.shared.down": "model.layers.{}.mlp.shared_expert.down_proj",
    "blocks.{}.mlp.shared_gate": "model.layers.{}.mlp.shared_expert_gate",
}
NAMES = llama.NAMES | EXPERTS | SHARED
GGUF = Gguf(
    "qwen2moe",
    keys=families.EXPERTS | families.OWN_SIZE | families.SHARED_SIZE,
    graph={"qkv_bias": (True,), "head_dim": usual_heads, "experts": in_all_layers(normed=False)},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen2MoeConfig, beside the rotary positions."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = or_zero(4096)  # 0 is what transformers writes if it is off
    max_window_layers: int = 28
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 1408
    shared_expert_intermediate_size: int = 5632
    num_experts_per_tok: int = 4
    num_experts: int = 60
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] | None = None
    qkv_bias: bool = True
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen2MoeForCausalLM describes."""
    keys = Keys.read(without_empty(hf))
    window = (keys.sliding_window or None) if keys.use_sliding_window else None
    experts = Experts(
        keys.num_experts,
        keys.num_experts_per_tok,
        keys.moe_intermediate_size,
        keys.norm_topk_prob,
        shared_d_ff=keys.shared_expert_intermediate_size,
        shared_gate=True,
    )
    config = llama.usual(keys, hf, qkv_bias=keys.qkv_bias)
    config = replace(config, experts=replace(experts, dense_layers=dense_layers(keys)))
    slides = lambda layer: keys.use_sliding_window and layer % 2 == 0 and layer < keys.max_window_layers
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, window, config.layer(0).rope))
