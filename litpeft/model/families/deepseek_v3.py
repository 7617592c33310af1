"""DeepSeek-V3 and R1, and Moonlight: latent attention, and experts in groups beside shared ones.

The layers that predict further tokens (num_nextn_predict_layers) are not read. The dropout that its config.json may
name (attention_dropout) is not applied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, Latent, ModelConfig, checked, or_zero
from litpeft.model.families import EXPERTS as EXPERT_KEYS
from litpeft.model.families import OWN_SIZE, Gguf, llama, without
from litpeft.model.families.qwen3_moe import EXPERTS as ROUTED
from litpeft.model.parts import LATENT_EPS as EPS
from litpeft.model.rope import grown

EXPERTS = ROUTED | {
    "blocks.{}.mlp.shared.gate": "model.layers.{}.mlp.shared_experts.gate_proj",
    "blocks.{}.mlp.shared.up": "model.layers.{}.mlp.shared_experts.up_proj",
    "blocks.{}.mlp.shared.down": "model.layers.{}.mlp.shared_experts.down_proj",
}
NAMES = (
    without(without(llama.NAMES, "*.attn.k"), "*.attn.v")
    | EXPERTS
    | {
        "blocks.{}.attn.q_a": "model.layers.{}.self_attn.q_a_proj",
        "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_a_layernorm",
        "blocks.{}.attn.q_b": "model.layers.{}.self_attn.q_b_proj",
        "blocks.{}.attn.kv_a": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
        "blocks.{}.attn.kv_norm": "model.layers.{}.self_attn.kv_a_layernorm",
        "blocks.{}.attn.kv_b": "model.layers.{}.self_attn.kv_b_proj",
    }
)
GGUF_IGNORES = ("*.attn.q", "*.attn.q_a", "*.attn.q_b", "*.attn.kv_a", "*.attn.kv_b", "head")
GGUF_EXPERTS = {
    "leading_dense_block_count": ("experts", lambda experts: len(experts.dense_layers)),
    "expert_shared_count": ("experts", lambda experts: experts.shared_d_ff // experts.d_ff),
    "expert_weights_scale": ("experts", lambda experts: experts.scale),
    "expert_weights_norm": ("experts", lambda experts: experts.normed),
    "expert_gating_func": ("experts", lambda experts: 2 if experts.corrected else 1),
    "expert_group_count": ("experts", lambda experts: experts.groups),
    "expert_group_used_count": ("experts", lambda experts: experts.active_groups),
    **EXPERT_KEYS,
    **OWN_SIZE,
}
GGUF_KEYS = {
    "attention.head_count_kv": ("latent", lambda latent: 1),  # the vector that all heads share
    "attention.key_length": ("latent", lambda latent: latent.kv_rank + latent.turning),
    "attention.value_length": ("latent", lambda latent: latent.kv_rank),
    "attention.key_length_mla": ("latent", lambda latent: latent.still + latent.turning),
    "attention.value_length_mla": ("latent", lambda latent: latent.values),
    "attention.q_lora_rank": ("latent", lambda latent: latent.q_rank),
    "attention.kv_lora_rank": ("latent", lambda latent: latent.kv_rank),
    **GGUF_EXPERTS,
}


def no_gguf(config: ModelConfig) -> str | None:
    """Returns what llama.cpp does not compute."""
    scaling, lite = config.rope_scaling, config.n_layers in (26, 27)
    if scaling is not None and (config.score_scale is None or not math.isclose(scaling.attention_factor, 1)):
        return "this model has yarn with an mscale that is not its mscale_all_dim; llama.cpp takes both for the same"
    if config.experts.groups == config.experts.active_groups > 1:
        return "topk_group is n_group, with which llama.cpp stops; write 1 for both in config.json: that is the same"
    if lite != (config.latent.q_rank is None):
        this = f"this has {config.n_layers} and {'no' if config.latent.q_rank is None else 'a'} q_lora_rank"
        return f"llama.cpp takes 26 and 27 layers for a model without q_lora_rank; {this}"
    return None


GGUF = Gguf(
    "deepseek2",
    yarn_multiplier=0.1,
    ignores=GGUF_IGNORES,
    refuses=no_gguf,
    only=("expert_gating_func", 2),
    keys=GGUF_KEYS,
    graph={
        "experts": lambda config: (config.experts,),
        "rope_pairs": (True,),
        "norm_eps": (EPS,),  # of the norms inside attention, too
        "score_scale": lambda config: (config.score_scale,),  # it follows from yarn
    },
)
BUFFERS = ("*.rotary_emb.inv_freq", "model.layers.61.*")  # the layer that predicts a further token


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' DeepseekV3Config, beside the rotary positions."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    num_key_value_heads: int | None = 128
    n_shared_experts: int = 1
    n_routed_experts: int = 256
    routed_scaling_factor: float = 2.5
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    qk_rope_head_dim: int = 64
    v_head_dim: int | None = 128
    qk_nope_head_dim: int = 128
    n_group: int | None = 8
    topk_group: int | None = 4
    num_experts_per_tok: int | None = 8
    first_k_dense_replace: int | None = or_zero(3)
    norm_topk_prob: bool | None = True
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_interleave: bool | None = True
    attention_bias: bool = False

    ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of DeepseekV3ForCausalLM describes."""
    keys = Keys.read(hf)
    refuse_null(keys, "n_group", "topk_group", "first_k_dense_replace")
    return latent(keys, hf, experts=chosen_by_sigmoids(keys), rope_pairs=bool(keys.rope_interleave))


def chosen_by_sigmoids(keys: Any) -> Experts:
    """Returns the experts of V3, and of families that have taken them over."""
    switches = {"groups": keys.n_group, "active_groups": keys.topk_group, "corrected": True}
    return replace(experts_of(keys), normed=bool(keys.norm_topk_prob), **switches)


def refuse_null(keys: ConfigKeys, *names: str) -> None:
    """Raises if one of these keys is null."""
    if null := [name for name in names if getattr(keys, name) is None]:
        other = "".join(f" ({alias})" for alias, name in keys.ALIASES.items() if name == null[0])
        raise ValueError(f"{null[0]}{other} null is not supported; it must be a number")


def experts_of(keys: Any) -> Experts:
    """Returns what both generations' experts have in common."""
    refuse_null(keys, "num_experts_per_tok")
    return Experts(
        keys.n_routed_experts,
        keys.num_experts_per_tok,
        keys.moe_intermediate_size,
        dense_layers=tuple(range(min(keys.first_k_dense_replace, keys.num_hidden_layers))),
        shared_d_ff=keys.n_shared_experts * keys.moe_intermediate_size,
        scale=keys.routed_scaling_factor,
        wide_router=True,
    )


def latent(keys: Any, hf: Mapping[str, Any], **switches: Any) -> ModelConfig:
    """Returns the ModelConfig of keys of both generations."""
    refuse_null(keys, "v_head_dim")
    heads, size = keys.num_attention_heads, keys.qk_nope_head_dim + keys.qk_rope_head_dim
    if keys.num_key_value_heads not in (None, heads):
        what = f"num_key_value_heads {keys.num_key_value_heads} is not supported"
        raise ValueError(f"{what}; it must be num_attention_heads, {heads}")
    if keys.v_head_dim > size:
        what = f"v_head_dim {keys.v_head_dim} is not supported"
        raise ValueError(f"{what}; it must be at most qk_nope_head_dim + qk_rope_head_dim, {size}")
    sizes = keys.q_lora_rank, keys.kv_lora_rank, keys.qk_nope_head_dim, keys.qk_rope_head_dim, keys.v_head_dim
    config = llama.usual(
        keys,
        {**hf, "head_dim": size},
        latent=Latent(*sizes),
        **switches,
    )
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    all_dims = checked(f"{where}.mscale_all_dim", (hf.get(where) or {}).get("mscale_all_dim"), float | None)
    if config.rope_scaling is None or all_dims is None:
        return config
    return replace(config, score_scale=size**-0.5 * grown(config.rope_scaling.factor, all_dims) ** 2)
