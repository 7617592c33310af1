"""DeepSeek-V2 and V2-Lite: latent attention, and experts beside shared ones.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, or_zero
from litpeft.model.families import Gguf, deepseek_v3

NAMES = deepseek_v3.NAMES
GGUF = Gguf(
    "deepseek2",
    yarn_multiplier=0.1,
    ignores=deepseek_v3.GGUF_IGNORES,
    refuses=deepseek_v3.no_gguf,
    keys=deepseek_v3.GGUF_KEYS,
    graph=deepseek_v3.GGUF.graph
    | {"experts": lambda config: (replace(config.experts, groups=1, active_groups=1),)},  # chosen as V3 chooses them
)
BUFFERS = ("*.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' DeepseekV2Config, beside the rotary positions."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: Literal[False] = False  # experts would have none
    first_k_dense_replace: int = or_zero(0)
    kv_lora_rank: int = 512
    q_lora_rank: int | None = 1536
    n_group: int | None = None
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    routed_scaling_factor: float = 1.0
    topk_group: int | None = None
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    norm_topk_prob: Literal[False, None] = False  # DeepSeek's own code norms the shares, transformers does not
    v_head_dim: int = 128
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int = 1407

    ALIASES = {"num_experts": "n_routed_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of DeepseekV2ForCausalLM describes."""
    keys = Keys.read(hf)
    experts = deepseek_v3.experts_of(keys)
    if keys.topk_method != "greedy":
        deepseek_v3.refuse_null(keys, "n_group", "topk_group")
        experts = replace(experts, groups=keys.n_group, active_groups=keys.topk_group)
    return deepseek_v3.latent(keys, hf, experts=experts, rope_pairs=True)
