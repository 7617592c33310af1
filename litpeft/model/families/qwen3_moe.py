"""Qwen3's mixtures of experts: Qwen3 with experts in most layers.

The router's extra loss and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model import families
from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig, checked
from litpeft.model.families import Gguf, in_all_layers, llama, qwen3

EXPERTS = {
    "blocks.{}.mlp.router": "model.layers.{}.mlp.gate",
    "blocks.{}.mlp.experts.{}.gate": "model.layers.{}.mlp.experts.{}.gate_proj",
    "blocks.{}.mlp.experts.{}.up": "model.layers.{}.mlp.experts.{}.up_proj",
    "blocks.{}.mlp.experts.{}.down": "model.layers.{}.mlp.experts.{}.down_proj",
}
NAMES = qwen3.NAMES | EXPERTS
GGUF = Gguf(
    "qwen3moe",
    keys=families.EXPERTS | families.OWN_SIZE,
    graph={"qk_norm": ("head",), "experts": in_all_layers(normed=True)},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Qwen3MoeConfig, beside the rotary positions."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    mlp_only_layers: list[int] | None = None

    ALIASES = {"num_experts": "num_local_experts"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Qwen3MoeForCausalLM describes."""
    keys = Keys.read(without_empty(hf))
    config = llama.usual(keys, hf, qk_norm="head")
    # transformers 5 writes another name
    number = checked("num_local_experts", hf.get("num_local_experts", keys.num_experts), int)
    sizes = number, keys.num_experts_per_tok, keys.moe_intermediate_size
    experts = Experts(*sizes, keys.norm_topk_prob, dense_layers=dense_layers(keys))
    window = keys.sliding_window if keys.use_sliding_window else None
    return replace(config, window=window, experts=experts)


def without_empty(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config.json without the empty list of layers that Qwen's files have."""
    return {key: value for key, value in hf.items() if (key, value) != ("mlp_only_layers", [])}


def dense_layers(keys: Any) -> tuple[int, ...]:
    """Returns the layers without experts."""
    dense, step = keys.mlp_only_layers or [], keys.decoder_sparse_step
    return tuple(layer for layer in range(keys.num_hidden_layers) if layer in dense or (layer + 1) % step)
