"""EXAONE 4: LLaMA with norms after each sub-layer and on the queries and keys of each head.

With a window, which the 32B has in three of four layers, the layers that see all tokens have no positions. The dropout
that its config.json may name (attention_dropout) is not applied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, or_zero
from litpeft.model.families import Gguf, llama, olmo2, window_of
from litpeft.model.rope import FULL, layers_of

NAMES = olmo2.NAMES


def layers(config: ModelConfig) -> tuple[Any, ...]:
    """Returns the layers that llama.cpp builds: windows in three of four if there are 64, else none."""
    slides = [at % 4 < 3 for at in range(config.n_layers)]
    if config.n_layers != 64:
        return ((),)
    return (config.layers,) if [layer.window is not None for layer in config.layers] == slides else ()


def implied(header: Any) -> dict[str, Any]:
    """Returns the keys of config.json that a header without a window implies."""
    if "attention.sliding_window" in header:
        return {}
    return {"sliding_window": None, "layer_types": [FULL] * header.number("block_count", int)}


GGUF = Gguf(
    "exaone4",
    keys={"attention.sliding_window": ("layers", window_of)},
    graph={"norms": ("after",), "qk_norm": ("head",), "layers": layers},
    implied=implied,
)


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Exaone4Config, beside the rotary positions."""

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    hidden_act: Literal[tuple(ACTIVATIONS)] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    sliding_window: int | None = 4096
    sliding_window_pattern: str | int | None = or_zero(4)  # 0 is what transformers writes without a window
    layer_types: list[str] | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Exaone4ForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, hf, norms="after", qk_norm="head")
    window, rope = keys.sliding_window, config.layer(0).rope
    layers = layers_of(keys.layer_types, sliding(keys), config.n_layers, window, rope)
    rotates = lambda layer: window is None or layer.window is not None
    return config.with_layers(layer if rotates(layer) else replace(layer, rope=None) for layer in layers)


def sliding(keys: Keys) -> Callable[[int], bool]:
    """Returns which layers have the window, if `layer_types` does not say it."""
    pattern, known = keys.sliding_window_pattern, keys.layer_types is not None
    if not known and keys.sliding_window is not None and (not isinstance(pattern, int) or pattern == 0):
        raise ValueError(
            f"sliding_window_pattern {pattern!r} without layer_types is not supported; it must be a number"
        )
    return lambda layer: keys.sliding_window is not None and (layer + 1) % pattern != 0
