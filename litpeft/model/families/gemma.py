"""Gemma 1: LLaMA with scaled embeddings, norms whose files hold weight - 1, and GELU.

transformers reads the first files' "gelu" as its tanh approximation, and so does litpeft.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama

NAMES = llama.NAMES
BUFFERS = llama.BUFFERS
GGUF = Gguf(
    "gemma",
    norms=1.0,
    graph={
        "norm": ("rms_1p",),
        "activation": ("gelu_tanh",),
        "embed_scale": lambda config: (config.d_model**0.5,),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GemmaConfig, beside the rotary positions."""

    vocab_size: int = 256000
    hidden_size: int = 3072
    intermediate_size: int = 24576
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    hidden_act: Literal[tuple(ACTIVATIONS)] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    head_dim: int = 256
    attention_bias: bool = False
    use_bidirectional_attention: Literal[False, None] = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GemmaForCausalLM describes."""
    keys = Keys.read(hf)
    act = "gelu_pytorch_tanh" if keys.hidden_act == "gelu" else keys.hidden_act
    return llama.usual(keys, hf, norm="rms_1p", embed_scale=keys.hidden_size**0.5, activation=ACTIVATIONS[act])
