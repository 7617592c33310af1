"""Nemotron and Minitron: layer norms whose files hold weight - 1, and an MLP without a gate."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, llama, usual_heads

NAMES = llama.NAMES
DEVIATION = 0.0134
GGUF = Gguf(
    "nemotron",
    own_head=True,
    norms=1.0,
    keys={"rope.dimension_count": "rotary_dim"},
    graph={
        **llama.GGUF.graph,
        "norm": ("layer_1p",),
        "activation": ("relu2",),
        "gated_mlp": (False,),
        "head_dim": usual_heads,
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' NemotronConfig, beside the rotary positions."""

    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "relu2"
    max_position_embeddings: int = 4096
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of NemotronForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, share=0.5, norm="layer_1p", norm_eps=keys.norm_eps, gated_mlp=False)
