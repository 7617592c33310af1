"""Tencent's Hunyuan of 0.5B to 7B: LLaMA with a norm on the queries and keys of each head, after they have rotated.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf, llama
from litpeft.model.rope import stretched

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.query_layernorm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.key_layernorm",
}
GGUF = Gguf("hunyuan-dense", graph={"qk_norm": ("rotated",)})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' HunYuanDenseV1Config, beside the rotary positions."""

    vocab_size: int = 290943
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    head_dim: int | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of HunYuanDenseV1ForCausalLM describes."""
    keys = Keys.read(hf)
    plain, name, alpha = without_alpha(hf)
    config = llama.usual(keys, plain, qk_norm="rotated")
    if alpha is None:
        return config
    try:
        return replace(config, rope_theta=stretched(config.rope_theta, alpha, config.head_dim))
    except ArithmeticError:
        raise ValueError(f"{name} {alpha} is not supported for heads of size {config.head_dim}") from None


def without_alpha(hf: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, float | None]:
    """Returns a config.json with plain rotary positions in place of those that have an alpha, its name and its value.

    The files call that kind of scaling "dynamic", like the one that depends on the length of the text.
    """
    where = next((key for key in ("rope_scaling", "rope_parameters") if checked(key, hf.get(key), dict | None)), "")
    rope = hf[where] if where else {}
    alpha = checked(f"{where}.alpha", rope.get("alpha"), float | None)
    if alpha is None or rope.get("rope_type", rope.get("type")) != "dynamic":
        return hf, "", None
    return {**hf, where: {**rope, "rope_type": "default"}}, f"{where}.alpha", alpha
