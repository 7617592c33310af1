"""GLM-4.5, 4.5-Air and 4.6: LLaMA of which half of each head rotates, and DeepSeek-V3's experts.

The layers that predict further tokens (num_nextn_predict_layers) are not read. The dropout that its config.json may
name (attention_dropout) is not applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, or_zero
from litpeft.model.families import Gguf, deepseek_v3, llama, qwen3

NAMES = qwen3.NAMES | deepseek_v3.EXPERTS
BUFFERS = ("model.layers.46.*", "model.layers.92.*")  # the layer that predicts a further token


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys of config.json that follow from a header and its tensors."""
    dense = header.take("leading_dense_block_count", int) or 0
    return {"use_qk_norm": "blk.0.attn_q_norm.weight" in header.stored, "first_k_dense_replace": dense}


GGUF = Gguf(
    "glm4moe",
    keys={"rope.dimension_count": "rotary_dim", **deepseek_v3.GGUF_EXPERTS},
    graph={
        "qkv_bias": llama.EITHER,
        "qk_norm": (None, "head"),
        "experts": lambda config: (replace(config.experts, groups=1, active_groups=1),),
    },
    implied=implied,
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Glm4MoeConfig, beside the rotary positions."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    num_hidden_layers: int = 46
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    moe_intermediate_size: int = 1408
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    n_routed_experts: int = 128
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    first_k_dense_replace: int = or_zero(1)
    norm_topk_prob: bool = True
    use_qk_norm: bool = False

    ALIASES = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Glm4MoeForCausalLM describes."""
    keys = Keys.read(hf)
    qk_norm = "head" if keys.use_qk_norm else None
    experts = deepseek_v3.chosen_by_sigmoids(keys)
    return llama.usual(keys, hf, share=0.5, output_bias=False, qk_norm=qk_norm, experts=experts)
