"""Starcoder2: LLaMA with layer norms, an MLP without a gate, and biases.

The dropout that its config.json may name (residual_dropout, embedding_dropout, attention_dropout) is not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES | {
    "blocks.{}.mlp.up": "model.layers.{}.mlp.c_fc",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.c_proj",
}
DEVIATION = 0.018042
GGUF = Gguf(
    "starcoder2",
    graph={
        "norm": ("layer",),
        "activation": ("gelu", "gelu_tanh"),
        "gated_mlp": (False,),
        "head_dim": usual_heads,
        **dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), (True,)),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Starcoder2Config, beside the rotary positions."""

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int = 2
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    sliding_window: int | None = None
    use_bias: bool = True


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Starcoder2ForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(
        keys,
        hf,
        norm="layer",
        norm_eps=keys.norm_epsilon,
        gated_mlp=False,
        qkv_bias=keys.use_bias,
        output_bias=keys.use_bias,
        mlp_bias=keys.use_bias,
        window=keys.sliding_window,
    )
