"""GLM-4 of 2024 and GLM-Edge: LLaMA of which half of each head rotates, in pairs that lie side by side."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig
from litpeft.model.families import Gguf, Place, llama, usual_heads

GATE_UP = Place("model.layers.{}.mlp.gate_up_proj")
NAMES = llama.NAMES | {"blocks.{}.mlp.gate": GATE_UP, "blocks.{}.mlp.up": GATE_UP}
GGUF = Gguf(
    "chatglm",
    keys={"rope.dimension_count": "rotary_dim"},
    graph={"rope_pairs": (True,), "qkv_bias": llama.EITHER, "head_dim": usual_heads},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' GlmConfig, beside the rotary positions."""

    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 13696
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 2
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 0.00000015625
    tie_word_embeddings: bool = False
    head_dim: int | None = 128
    attention_bias: bool = True


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of GlmForCausalLM describes."""
    keys = Keys.read(hf)
    return llama.usual(keys, hf, share=0.5, rope_pairs=True, output_bias=False)
