"""ERNIE 4.5's mixtures of experts, 21B-A3B and 300B-A47B: ERNIE 4.5 with experts in most layers, beside shared ones.

The router's extra loss (router_aux_loss_coef) is not applied, and the layers that predict further tokens are not read.
transformers holds the router in float32 whatever the model's precision is; here it has that of the run.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig, or_zero
from litpeft.model.families import EXPERTS, OWN_SIZE, SHARED_SIZE, Gguf, deepseek_v3, llama

NAMES = llama.NAMES | deepseek_v3.EXPERTS | {"blocks.{}.mlp.router.statics": "model.layers.{}.mlp.moe_statics"}
BUFFERS = ("*mtp*",)  # the layer that predicts a further token


def implied(header: Any) -> dict[str, int]:
    """Returns the keys of config.json that are 0 where a header lacks them."""
    said = {"moe_layer_start_index": "leading_dense_block_count", "moe_num_shared_experts": "expert_shared_count"}
    return {key: header.take(name, int) or 0 for key, name in said.items()}


GGUF = Gguf(
    "ernie4_5-moe",
    keys={
        "leading_dense_block_count": ("experts", lambda experts: len(experts.dense_layers)),
        "interleave_moe_layer_step": ("experts", lambda experts: 1),
        "expert_shared_count": ("experts", lambda experts: (experts.shared_d_ff or 0) // experts.d_ff),
        **SHARED_SIZE,
        **EXPERTS,
        **OWN_SIZE,
    },
    graph={"rope_pairs": (True,), "experts": lambda config: (leading(config.experts),)},
)
OF_EXPERTS = (
    "moe_k",
    "moe_num_experts",
    "moe_num_shared_experts",
    "moe_layer_start_index",
    "moe_layer_end_index",
    "moe_layer_interval",
    "moe_norm_min",
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Ernie4_5_MoeConfig, beside the rotary positions."""

    vocab_size: int = 103424
    hidden_size: int = 2560
    intermediate_size: int = 12288
    num_hidden_layers: int = 28
    num_attention_heads: int = 20
    num_key_value_heads: int | None = 4
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    use_bias: Literal[False, None] = False  # experts would have none
    moe_intermediate_size: int = 1536
    moe_k: int | None = 6
    moe_num_experts: int | None = 64
    moe_num_shared_experts: int | None = or_zero(2)
    moe_layer_start_index: int | None = or_zero(1)
    moe_layer_end_index: int | None = or_zero(-1)
    moe_layer_interval: int | None = 1
    moe_norm_min: float | None = 1e-12

    ALIASES = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Ernie4_5_MoeForCausalLM describes."""
    keys = Keys.read({key: value for key, value in hf.items() if (key, value) != ("moe_layer_end_index", -1)})
    deepseek_v3.refuse_null(keys, *OF_EXPERTS)
    experts = Experts(
        keys.moe_num_experts,
        keys.moe_k,
        keys.moe_intermediate_size,
        normed=True,
        dense_layers=dense_layers(keys),
        shared_d_ff=keys.moe_num_shared_experts * keys.moe_intermediate_size or None,
        wide_router=True,
        statics=True,
        least_sum=keys.moe_norm_min,
    )
    return llama.usual(keys, hf, theta=500_000.0, rope_pairs=True, experts=experts)


def dense_layers(keys: Keys) -> tuple[int, ...]:
    """Returns the layers without experts."""
    first, last, count = keys.moe_layer_start_index, keys.moe_layer_end_index, keys.num_hidden_layers
    mixed = range(first, count if last == -1 else last + 1)
    return tuple(layer for layer in range(count) if layer not in mixed or (layer + 1) % keys.moe_layer_interval)


def leading(experts: Experts) -> Experts:
    """Returns the experts that llama.cpp computes with: in all layers after the first plain ones."""
    return replace(experts, dense_layers=tuple(range(len(experts.dense_layers))), least_sum=1e-12)
