"""Cohere's Command R and Aya: one layer norm without a bias for both sub-layers, and scaled logits."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_norm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_norm",
}
GGUF = Gguf(
    "command-r",
    keys={"logit_scale": "logit_scale"},
    graph={
        "norm": ("layer_no_bias",),
        "rope_pairs": (True,),
        "shared_norm": (True,),
        "head_dim": usual_heads,
        "qk_norm": lambda config: ("each" if config.n_layers >= 64 else None,),  # it knows Command R+ by its layers
    },
    implied=lambda header: {"use_qk_norm": "blk.0.attn_q_norm.weight" in header.stored},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' CohereConfig, beside the rotary positions."""

    vocab_size: int = 256000
    hidden_size: int = 8192
    intermediate_size: int = 22528
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 8192
    layer_norm_eps: float | None = 1e-5
    tie_word_embeddings: bool = True
    logit_scale: float | None = 0.0625
    attention_bias: bool = False
    use_qk_norm: bool | None = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of CohereForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, theta=500_000.0, qk_norm="each" if keys.use_qk_norm else None, **switches(keys))


def switches(keys: Any) -> dict[str, Any]:
    """Returns what both generations have beside Llama."""
    if null := [key for key in ("layer_norm_eps", "logit_scale") if getattr(keys, key) is None]:
        raise ValueError(f"{null[0]} null is not supported; it must be a number above 0")
    return {
        "norm": "layer_no_bias",
        "norm_eps": keys.layer_norm_eps,
        "shared_norm": True,
        "rope_pairs": True,
        "logit_scale": keys.logit_scale,
    }
