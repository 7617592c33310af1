"""OLMoE: a mixture of experts in each layer, and norms over all queries and keys of a token.

The router's extra loss and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model import families
from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig
from litpeft.model.families import Gguf, in_all_layers, llama, qwen3_moe, without

NAMES = without(qwen3_moe.NAMES, "*.mlp.*")
NAMES |= qwen3_moe.EXPERTS
GGUF = Gguf(
    "olmoe",
    own_head=True,
    keys=families.EXPERTS,
    graph={
        "qk_norm": ("all",),
        "n_kv_heads": lambda config: (config.n_heads,),  # the norms of keys are as wide as those of queries
        "experts": in_all_layers(normed=False),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' OlmoeConfig, beside the rotary positions."""

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    clip_qkv: float | None = None
    num_experts_per_tok: int = 8
    num_experts: int = 64
    norm_topk_prob: bool = False

    ALIASES = {"num_local_experts": "num_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of OlmoeForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf, qk_norm="all", clip_qkv=keys.clip_qkv)
    experts = Experts(keys.num_experts, keys.num_experts_per_tok, keys.intermediate_size, keys.norm_topk_prob)
    return replace(config, experts=experts)
