"""Liquid's LFM2 with experts: those are chosen by sigmoids, in all layers but the first ones."""

from dataclasses import dataclass
from typing import Any

from litpeft.model.config import ConfigKeys, Experts, ModelConfig, or_zero
from litpeft.model.families import lfm2, llama

PLACE = "model.layers.{}.feed_forward"
NAMES = lfm2.NAMES | {
    "blocks.{}.mlp.router": f"{PLACE}.gate",
    "blocks.{}.mlp.router.apart": PLACE,  # expert_bias
    "blocks.{}.mlp.experts.{}.gate": f"{PLACE}.experts.{{}}.w1",
    "blocks.{}.mlp.experts.{}.up": f"{PLACE}.experts.{{}}.w3",
    "blocks.{}.mlp.experts.{}.down": f"{PLACE}.experts.{{}}.w2",
}


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Lfm2MoeConfig, beside the rotary positions."""

    vocab_size: int = 65536
    hidden_size: int = 2048
    intermediate_size: int = 7168
    moe_intermediate_size: int = 1792
    num_hidden_layers: int = 32
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 128_000
    norm_eps: float = 0.00001
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    conv_bias: bool = False
    conv_L_cache: int = 3
    num_dense_layers: int = or_zero(2)
    num_experts_per_tok: int = 4
    num_experts: int = 32
    use_expert_bias: bool = True
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Lfm2MoeForCausalLM describes."""
    keys = Keys.read(hf | ({"tie_word_embeddings": hf["tie_embedding"]} if "tie_embedding" in hf else {}))
    if keys.layer_types is None:
        raise ValueError("layer_types null is not supported; it must be a list of names")
    experts = Experts(
        keys.num_experts,
        keys.num_experts_per_tok,
        keys.moe_intermediate_size,
        normed=keys.norm_topk_prob,
        dense_layers=tuple(range(min(keys.num_dense_layers, keys.num_hidden_layers))),
        scale=keys.routed_scaling_factor,
        sigmoids=True,
        apart=keys.use_expert_bias,
        sum_plus=1e-6,
    )
    sizes = {"theta": 1000000.0, "qk_norm": "head", "norm_eps": keys.norm_eps}
    return lfm2.with_convolutions(llama.usual(keys, hf, experts=experts, **sizes), keys, keys.layer_types)
