"""Phi-3, 3.5 and 4: LLaMA whose files hold q, k and v as one tensor, and gate and up as another.

Rotary positions of texts beyond the original length differ from those within it (longrope).
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, Place, llama, usual_heads

QKV = Place("model.layers.{}.self_attn.qkv_proj")
GATE_UP = Place("model.layers.{}.mlp.gate_up_proj")
NAMES = llama.NAMES | {
    "blocks.{}.attn.q": QKV,
    "blocks.{}.attn.k": QKV,
    "blocks.{}.attn.v": QKV,
    "blocks.{}.mlp.gate": GATE_UP,
    "blocks.{}.mlp.up": GATE_UP,
}
OLD_KINDS = ("su", "yarn")  # what the first files call longrope
GGUF = Gguf(
    "phi3",
    own_head=True,
    keys={"rope.dimension_count": "rotary_dim"},
    graph={"head_dim": usual_heads},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Phi3Config, beside the rotary positions."""

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    original_max_position_embeddings: int = 4096
    sliding_window: int | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Phi3ForCausalLM describes."""
    keys = Keys.read(hf)
    hf = hf | {"original_max_position_embeddings": keys.original_max_position_embeddings}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(given := hf.get(key), dict) and given.get("rope_type", given.get("type")) in OLD_KINDS:
            hf[key] = given | {"rope_type": "longrope"}
    config = llama.usual(keys, hf, share=1.0, window=keys.sliding_window)
    if config.rope_scaling is not None and config.rope_scaling.kind != "longrope":
        raise ValueError(f"rope_type {config.rope_scaling.kind} is not supported; it must be default or longrope")
    return config
