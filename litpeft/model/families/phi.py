"""Phi-1, 1.5 and 2: one layer norm for attention and an MLP without a gate, biases everywhere, half of a head rotates.

The dropout that its config.json may name (resid_pdrop, embd_pdrop, attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES | {
    "blocks.{}.attn.q_norm": "model.layers.{}.self_attn.q_layernorm",
    "blocks.{}.attn.k_norm": "model.layers.{}.self_attn.k_layernorm",
    "blocks.{}.attn.o": "model.layers.{}.self_attn.dense",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.fc1",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.fc2",
    "norm": "model.final_layernorm",
}
GGUF = Gguf(
    "phi2",
    keys={"rope.dimension_count": "rotary_dim"},
    graph={
        "norm": ("layer",),
        "activation": ("gelu", "gelu_tanh"),
        "gated_mlp": (False,),
        "head_dim": usual_heads,
        **dict.fromkeys(("shared_norm", "qkv_bias", "output_bias", "mlp_bias", "head_bias"), (True,)),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' PhiConfig, beside the rotary positions."""

    vocab_size: int = 51200
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: Literal[False] = False  # its head has a bias
    qk_layernorm: bool = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of PhiForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(
        keys,
        hf,
        share=0.5,
        norm="layer",
        norm_eps=keys.layer_norm_eps,
        qk_norm="head" if keys.qk_layernorm else None,
        gated_mlp=False,
        shared_norm=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
