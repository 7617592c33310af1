"""OLMo 3: OLMo 2 with a window in three of four layers; only the others' rotary positions may be scaled."""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, Rope
from litpeft.model.families import Gguf, alternating, llama, olmo2, window_of
from litpeft.model.rope import FULL, SLIDING, layers_of, rope_by_type, without_rope

NAMES = olmo2.NAMES
THETAS = {FULL: ("rope_theta", 500_000.0), SLIDING: ("", 500_000.0)}


def layers(config: ModelConfig) -> tuple[Any, ...]:
    """Returns the layers that llama.cpp builds: those with a window rotate at the others' theta, without a scaling."""
    local = {layer.rope for layer in config.layers if layer.window is not None}
    return alternating(config, 4) if local <= {Rope(config.main_rope.theta)} else ((),)


GGUF = Gguf(
    "olmo2",
    own_head=True,
    keys={"attention.sliding_window": ("layers", window_of)},
    graph={**olmo2.GGUF.graph, "layers": layers},
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Olmo3Config, beside the rotary positions."""

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Olmo3ForCausalLM describes."""
    keys = Keys.read(hf)
    ropes = rope_by_type(hf, keys.max_position_embeddings, THETAS)
    config = llama.usual(keys, without_rope(hf), norms="after", qk_norm="all")
    slides = lambda layer: (layer + 1) % 4 != 0
    return config.with_layers(layers_of(keys.layer_types, slides, config.n_layers, keys.sliding_window, ropes))
