"""Granite 3 with experts, 1B-A400M and 3B-A800M: Granite with a mixture of experts in each layer.

The router's extra loss and the dropout that its config.json may name (router_aux_loss_coef, attention_dropout) are not
applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model import families
from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig
from litpeft.model.families import Gguf, Place, granite, in_all_layers, llama, without
from litpeft.model.families.deepseek_v3 import refuse_null

GATE_UP = Place("model.layers.{}.block_sparse_moe.input_linear.weight", stack=True)
EXPERTS = {
    "blocks.{}.mlp.router": "model.layers.{}.block_sparse_moe.router.layer",
    "blocks.{}.mlp.experts.{}.gate": GATE_UP,
    "blocks.{}.mlp.experts.{}.up": GATE_UP,
    "blocks.{}.mlp.experts.{}.down": Place("model.layers.{}.block_sparse_moe.output_linear.weight", stack=True),
}
NAMES = without(llama.NAMES, "*.mlp.*") | EXPERTS
GGUF = Gguf(
    "granitemoe",
    pairs=True,
    keys=granite.GGUF.keys | families.EXPERTS,
    graph={"qkv_bias": llama.EITHER, "output_bias": llama.EITHER, "experts": in_all_layers(normed=True)},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GraniteMoeConfig, beside the rotary positions."""

    vocab_size: int = 32000
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
    embedding_multiplier: float | int | None = 1.0
    logits_scaling: float | int | None = 1.0
    residual_multiplier: float | int | None = 1.0
    attention_multiplier: float | int | None = 1.0
    num_local_experts: int | None = 8
    num_experts_per_tok: int | None = 2


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GraniteMoeForCausalLM describes."""
    keys = Keys.read(hf)
    refuse_null(keys, *granite.SCALES, "num_local_experts", "num_experts_per_tok")
    experts = Experts(keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size, normed=True)
    return llama.usual(keys, hf, experts=experts, **granite.scales(keys))
