"""Granite 4.0 of 350M, 1B and micro: Granite whose MLP has other names; with experts, all tokens go through it.

Of this family's layers those of attention are built and those of Mamba are not. The router's extra loss and the dropout
that its config.json may name (router_aux_loss_coef, attention_dropout) are not applied.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Experts, ModelConfig, or_zero
from litpeft.model.families import Gguf, Place, granite, granitemoe, llama
from litpeft.model.families.deepseek_v3 import refuse_null
from litpeft.model.rope import FULL

MLP = Place("model.layers.{}.shared_mlp.input_linear")
NAMES = granitemoe.NAMES | {
    "blocks.{}.mlp.gate": MLP,
    "blocks.{}.mlp.up": MLP,
    "blocks.{}.mlp.down": "model.layers.{}.shared_mlp.output_linear",
    "blocks.{}.mlp.shared.gate": MLP,
    "blocks.{}.mlp.shared.up": MLP,
    "blocks.{}.mlp.shared.down": "model.layers.{}.shared_mlp.output_linear",
}
GGUF = Gguf(
    "granite",
    pairs=True,
    keys=granite.GGUF.keys,
    graph={"qkv_bias": llama.EITHER, "output_bias": llama.EITHER},
    names={f"blocks.{{}}.mlp.{name}": f"blk.{{}}.ffn_{name}" for name in ("gate", "up", "down")},
)
ATTENTION = ("attention", FULL)
MAMBA = "its layers of Mamba are not built; of Granite 4.0, 350m, 1b and micro have none (those without h in the name)"


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GraniteMoeHybridConfig, beside the rotary positions."""

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
    embedding_multiplier: int | float | None = 1.0
    logits_scaling: int | float | None = 1.0
    residual_multiplier: int | float | None = 1.0
    attention_multiplier: int | float | None = 1.0
    num_local_experts: int | None = or_zero(8)
    num_experts_per_tok: int | None = or_zero(2)
    shared_intermediate_size: int = 1024
    position_embedding_type: Literal["rope", "nope", None] = None  # the last two: none
    layer_types: list[str] | None = None

    ALIASES = {"layers_block_type": "layer_types"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GraniteMoeHybridForCausalLM describes."""
    keys = Keys.read(hf)
    refuse_null(keys, *granite.SCALES, "num_local_experts", "num_experts_per_tok")
    check_layers(keys)
    if keys.num_local_experts and not keys.num_experts_per_tok:
        raise ValueError(f"num_experts_per_tok 0 of {keys.num_local_experts} experts is not supported")
    sizes = keys.num_local_experts, keys.num_experts_per_tok, keys.intermediate_size
    shared = keys.shared_intermediate_size
    experts = Experts(*sizes, normed=True, shared_d_ff=shared) if keys.num_local_experts else None
    scales = granite.scales(keys)
    config = llama.usual(keys, hf, d_ff=shared, experts=experts, **scales)
    return config if keys.position_embedding_type == "rope" else replace(config, rotary_dim=0, rope_scaling=None)


def check_layers(keys: Keys) -> None:
    """Raises unless all layers are of attention."""
    types, count = keys.layer_types, keys.num_hidden_layers
    if types is None:
        raise ValueError(f"layer_types (layers_block_type) null is not supported: {MAMBA}")
    if strange := [kind for kind in types if kind not in ATTENTION]:
        raise ValueError(f"layer_types {strange[0]!r} is not supported: {MAMBA}")
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, num_hidden_layers says {count}")
