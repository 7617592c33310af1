"""Gemma 4 in a GGUF file: its layers differ in the sizes of their heads and MLPs, and share keys.

Where they differ the header has a list with a number for each layer. Full attention turns only the first frequencies:
a tensor divides the others by 1e30.
"""

from typing import Any

import torch
from torch import Tensor

from litpeft.core.errors import ModelError
from litpeft.model.config import ModelConfig
from litpeft.model.rope import FULL, PARTIAL, PROPORTIONAL, SLIDING

STILL = 1e30  # what llama.cpp divides the frequency by of dimensions that do not turn


def divisors(config: ModelConfig) -> Tensor:
    """Returns what the frequencies of full attention are divided by (D / 2,)."""
    layer = next(layer for layer in config.layers if layer.window is None)
    half, scaling = config.head_size(layer) // 2, layer.rope.scaling
    turning = int(scaling.share * half)
    return torch.tensor([scaling.factor] * turning + [STILL] * (half - turning))


def proportional(factors: Any, theta: float) -> dict[str, Any]:
    """Returns the positions of full attention, as config.json says them, from those divisors."""
    turning = int((factors < STILL / 2).sum())
    factor = float(factors[0]) if turning else 1.0
    if not ((factors[:turning] == factor).all() and (factors[turning:] > STILL / 2).all()):
        raise ModelError("rope_freqs.weight does not hold the first frequencies alone", hint="the file is damaged")
    said = {"rope_type": PROPORTIONAL, PARTIAL: turning / len(factors), "rope_theta": theta}
    return said if factor == 1 else said | {"factor": factor}


def sizes(given: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Returns the numbers of config.json that a header has for each layer; `known` are those of all."""
    count = given.number("block_count", int)
    slides = each(given, "attention.sliding_window_pattern", bool, count)
    heads, widths = (each(given, key, int, count) for key in ("attention.head_count_kv", "feed_forward_length"))
    shared = given.own.get("attention.shared_kv_layers", 0)
    if type(shared) is not int or not 0 <= shared < count or slides[-1]:
        raise ModelError(f"{count} layers that share {shared} keys, the last with a window: {slides[-1]}")
    full = [number for number, slide in enumerate(slides) if not slide]
    of_window = next((heads[number] for number, slide in enumerate(slides) if slide), heads[-1])
    same = any(f"blk.{number}.attn_v.weight" not in given.stored for number in full if number < count - shared)
    inputs = given.stored.get("per_layer_token_embd.weight")
    cap = {} if "final_logit_softcapping" in given else {"final_logit_softcapping": 30.0}
    return (
        known
        | cap
        | {
            "layer_types": [SLIDING if slide else FULL for slide in slides],
            "head_dim": given.number("attention.key_length_swa", int),
            "global_head_dim": given.number("attention.key_length", int),
            "num_key_value_heads": of_window,
            "num_global_key_value_heads": heads[full[0]] if same else None,
            "attention_k_eq_v": same,
            "num_kv_shared_layers": shared,
            "intermediate_size": widths[0],
            "use_double_wide_mlp": widths[-1] == 2 * widths[0],
            "hidden_size_per_layer_input": given.own.get("embedding_length_per_layer_input", 0),
            "vocab_size_per_layer_input": 1 if inputs is None else int(inputs.shape[-1]),
        }
    )


def each(given: Any, key: str, kind: type, count: int) -> list[Any]:
    """Returns a value of the header for each layer, of which it has one for all or a list."""
    value = given.own.get(key)
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count or not all(type(one) is kind and (kind is bool or one > 0) for one in values):
        raise ModelError(f"{given.arch}.{key} must be {count} of {kind.__name__}, got {value!s:.80}")
    return values
