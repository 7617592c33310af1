"""Gemma 4, its text models without experts: Gemma 3 whose layers differ in the sizes of their heads and share keys.

Layers without a window have larger heads, perhaps fewer of keys, whose values are then the keys; of each head only the
first frequencies turn. The last layers read the keys and values of the last one of their kind that computes its own.
Every layer reads a vector of its own of each token, and multiplies what it gives by a number of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, Layer, LayerInputs, ModelConfig, checked, or_zero
from litpeft.model.families import Gguf, gemma3_text, llama, window_of
from litpeft.model.rope import FULL, PROPORTIONAL, SLIDING, layers_of, rope_by_type, without_rope

NAMES = gemma3_text.NAMES | {
    "blocks.{}": "model.layers.{}",  # layer_scalar
    "blocks.{}.input.gate": "model.layers.{}.per_layer_input_gate",
    "blocks.{}.input.out": "model.layers.{}.per_layer_projection",
    "blocks.{}.input.norm": "model.layers.{}.post_per_layer_input_norm",
    "layer_inputs.embed": "model.embed_tokens_per_layer",
    "layer_inputs.project": "model.per_layer_model_projection",
    "layer_inputs.norm": "model.per_layer_projection_norm",
}


def of_layers(of: Callable[[ModelConfig, Layer], int]) -> tuple[str, Callable[[ModelConfig], int | list[int]]]:
    """Returns what a key of the header says: a number of all layers, or a list of theirs."""

    def value(config: ModelConfig) -> int | list[int]:
        values = [of(config, layer) for layer in config.layers]
        return values if len(set(values)) > 1 else values[0]

    return "", value


def no_gguf(config: ModelConfig) -> str | None:
    """Returns what llama.cpp does not compute."""
    first = sum(layer.keys_of is None for layer in config.layers)
    lenders = {layer.window: first - (1 if layer.window is None else 2) for layer in config.layers[first:]}
    if any(layer.keys_of != lenders[layer.window] for layer in config.layers[first:]):
        return "num_kv_shared_layers must leave a layer with a window and one without as the last two with keys"
    sizes = {(layer.window is None, config.head_size(layer), config.kv_heads(layer)) for layer in config.layers}
    if len(sizes) > len({kind for kind, *_ in sizes}) or len(sizes) < 2:
        return "layers of one kind have heads of several sizes, or all are of one kind (per_layer_config, layer_types)"
    inputs = config.layer_inputs
    if inputs is not None and inputs.vocab_size != config.vocab_size:
        return f"vocab_size_per_layer_input {inputs.vocab_size} is not vocab_size {config.vocab_size}"
    return None


GGUF = Gguf(
    "gemma4",
    ignores=("layer_inputs.project",),
    refuses=no_gguf,
    keys={
        "attention.sliding_window": ("layers", window_of),
        "attention.sliding_window_pattern": ("layers", lambda layers: [one.window is not None for one in layers]),
        "attention.shared_kv_layers": ("layers", lambda layers: sum(one.keys_of is not None for one in layers)),
        "attention.key_length": ("", lambda config: config.head_size(config.layers[-1])),
        "attention.value_length": ("", lambda config: config.head_size(config.layers[-1])),
        "attention.key_length_swa": "head_dim",
        "attention.value_length_swa": "head_dim",
        "attention.head_count_kv": of_layers(ModelConfig.kv_heads),
        "feed_forward_length": of_layers(lambda config, layer: layer.d_ff or config.d_ff),
        "rope.dimension_count": ("", lambda config: config.head_size(config.layers[-1])),
        "rope.dimension_count_swa": "head_dim",
        "rope.freq_base_swa": gemma3_text.GGUF.keys["rope.freq_base_swa"],
        "embedding_length_per_layer_input": ("", lambda config: config.layer_inputs.size if config.layer_inputs else 0),
        "final_logit_softcapping": ("", lambda config: config.logit_cap or 0.0),  # without the key it is 30
    },
    graph={
        "norms": ("around",),
        "qk_norm": ("head",),
        "value_norm": (True,),
        "activation": ("gelu_tanh", "gelu"),
        "embed_scale": lambda config: (config.d_model**0.5,),
        "score_scale": (1.0,),
        "layer_scale": (True,),
        "layer_inputs": lambda config: (config.layer_inputs,),
        "logit_cap": lambda config: (config.logit_cap,),
    },
)
BUFFERS = tuple(f"*.self_attn.{name}.weight" for name in ("k_proj", "v_proj", "k_norm"))  # of layers that share keys
THETAS = {FULL: ("", 1_000_000.0), SLIDING: ("", 10_000.0)}
ROPES = {FULL: {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}}
OF_LAYERS = {"head_dim": "head_dim", "num_key_value_heads": "n_kv_heads"}  # what per_layer_config may say


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' Gemma4TextConfig, beside the rotary positions and per_layer_config."""

    vocab_size: int = 262144
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 30
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    hidden_activation: Literal[tuple(ACTIVATIONS)] = "gelu_pytorch_tanh"
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    sliding_window: int = 512
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: Literal[None, "vision"] = None  # "vision": between the parts of an image only
    vocab_size_per_layer_input: int = 262144
    hidden_size_per_layer_input: int = or_zero(256)
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = or_zero(0)
    enable_moe_block: Literal[False] = False
    use_double_wide_mlp: bool = False


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of Gemma4ForCausalLM describes."""
    keys = Keys.read({key: value for key, value in hf.items() if key != "per_layer_config"})
    size = keys.hidden_size_per_layer_input
    config = llama.usual(
        keys,
        without_rope(hf),
        qk_norm="head",
        value_norm=True,
        norms="around",
        activation=ACTIVATIONS[keys.hidden_activation],
        embed_scale=keys.hidden_size**0.5,
        score_scale=1.0,
        logit_cap=keys.final_logit_softcapping,
        layer_inputs=LayerInputs(keys.vocab_size_per_layer_input, size) if size else None,
        layer_scale=True,
    )
    if size and keys.vocab_size_per_layer_input < keys.vocab_size:
        what = f"vocab_size_per_layer_input {keys.vocab_size_per_layer_input} is not supported"
        raise ValueError(f"{what}; it must be at least vocab_size {keys.vocab_size}")
    return config.with_layers(layers(keys, hf))


def layers(keys: Keys, hf: Mapping[str, Any]) -> list[Layer]:
    """Returns the layers. The last one has no window, whatever config.json says."""
    count, types = keys.num_hidden_layers, keys.layer_types
    given = hf if hf.get("rope_parameters") is not None else {"rope_parameters": ROPES}
    ropes = rope_by_type(given, keys.max_position_embeddings, THETAS)
    types = types if types is None else [*types[:-1], FULL]
    slides = lambda layer: (layer + 1) % 6 != 0 and layer != count - 1
    plain = layers_of(types, slides, count, keys.sliding_window, ropes)
    own, first = sizes(keys, hf, plain), count - keys.num_kv_shared_layers
    lenders = {layer.window: number for number, layer in enumerate(plain[: max(first, 0)])}
    if missing := [layer for layer in plain if layer.window not in lenders]:
        kind = FULL if missing[0].window is None else SLIDING
        what = f"num_kv_shared_layers {keys.num_kv_shared_layers} of {count} layers is not supported"
        raise ValueError(f"{what}: no layer of {kind} would have keys and values of its own (layer_types)")
    return [
        replace(
            layer,
            values_are_keys=keys.attention_k_eq_v and layer.window is None and number < first,
            keys_of=lenders[layer.window] if number >= first else None,
            d_ff=2 * keys.intermediate_size if keys.use_double_wide_mlp and number >= first else None,
            **own.get(number, {}),
        )
        for number, layer in enumerate(plain)
    ]


def sizes(keys: Keys, hf: Mapping[str, Any], plain: list[Layer]) -> dict[int, dict[str, int]]:
    """Returns what each layer has in place of head_dim and num_key_value_heads."""
    if "per_layer_config" not in hf:
        own = {"head_dim": checked("global_head_dim", hf.get("global_head_dim", 512), int)}
        heads = checked("num_global_key_value_heads", hf.get("num_global_key_value_heads"), int | None)
        own |= {"n_kv_heads": heads} if heads and keys.attention_k_eq_v else {}
        return {number: own for number, layer in enumerate(plain) if layer.window is None}
    found: dict[int, dict[str, int]] = {}
    for number, said in (checked("per_layer_config", hf["per_layer_config"], dict | None) or {}).items():
        where = f"per_layer_config.{number}"
        if not (number.isdecimal() and int(number) < len(plain)):
            raise ValueError(f"{where} is not supported; it must be the number of a layer")
        if strange := [key for key in checked(where, said, dict) if key not in OF_LAYERS]:
            allowed = " and ".join(OF_LAYERS)
            raise ValueError(f"{where}.{strange[0]} is not supported; a layer may have its own {allowed}")
        found[int(number)] = {OF_LAYERS[key]: checked(f"{where}.{key}", value, int) for key, value in said.items()}
    return found
