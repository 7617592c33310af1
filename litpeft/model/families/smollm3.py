"""SmolLM3: LLaMA with layers that have no positions."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Layer, ModelConfig
from litpeft.model.families import Gguf, llama
from litpeft.model.rope import layers_of

NAMES = llama.NAMES
GGUF = Gguf(
    "smollm3",
    pairs=True,
    graph={
        "layers": lambda config: (
            tuple(Layer(None, None if at % 4 == 3 else config.main_rope) for at in range(config.n_layers)),
        ),
    },
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' SmolLM3Config, beside the rotary positions."""

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    use_sliding_window: bool = False
    sliding_window: int | None = None
    no_rope_layers: list[int] | None = None  # 0 for a layer without positions, 1 for the others
    no_rope_layer_interval: int = 4
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of SmolLM3ForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf, theta=2_000_000.0)
    rotates, count = keys.no_rope_layers, config.n_layers
    if rotates is not None and len(rotates) != count:
        raise ValueError(f"no_rope_layers has {len(rotates)} entries, num_hidden_layers says {count}")
    turns = lambda layer: rotates[layer] if rotates else (layer + 1) % keys.no_rope_layer_interval
    slides = lambda layer: keys.use_sliding_window and keys.sliding_window is not None and not turns(layer)
    layers = layers_of(keys.layer_types, slides, count, keys.sliding_window, config.layer(0).rope)
    return config.with_layers(layer if turns(i) else replace(layer, rope=None) for i, layer in enumerate(layers))
