"""Rotary positions in the header of a GGUF file, and as a config.json says them."""

from typing import Any

import numpy as np
import torch

from litpeft.core.errors import ModelError
from litpeft.model.config import RopeScaling
from litpeft.model.families import family
from litpeft.model.frequencies import rope_frequencies
from litpeft.model.rope import FULL, PARTIAL, SLIDING

DIVISORS = "rope_freqs.weight"


def header_rope(given: Any, name: str) -> dict[str, Any]:
    """Returns the keys of config.json that say how the positions of a header rotate."""
    known = family(name).GGUF
    if known.graph.get("rotary_dim") == (0,):
        return {}
    width, heads = given.number("embedding_length", int), given.number("attention.head_count", int)
    head_dim = given.number("attention.key_length", int, max(width // heads, 1))
    rotary = given.number("rope.dimension_count", int, head_dim)
    theta = given.number("rope.freq_base", float, 10000.0)
    scaling = rope_scaling(given, theta, rotary)
    rope = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    if "rope.dimension_count" in known.keys:
        rope[PARTIAL] = rotary / head_dim
    if "rope.freq_base_swa" not in known.keys:
        return {"rope_parameters": rope}
    local = given.number("rope.freq_base_swa", float, 10000.0)
    return {  # for transformers 5, and for older readers
        "rope_parameters": {FULL: rope, SLIDING: {"rope_theta": local, "rope_type": "default"}},
        "rope_theta": theta,
        "rope_local_base_freq": local,
        "rope_scaling": scaling,
    }


def rope_scaling(given: Any, theta: float, rotary: int) -> dict[str, Any] | None:
    """Returns the scaling as Hugging Face writes it, or None."""
    kind = given.own.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"rope scaling {kind!r} is not supported; convert reads none, linear and llama3")
    if DIVISORS in given.stored:
        factors = numbers(given, DIVISORS, rotary // 2)
        if kind != "none" or not (factors == 1).all():
            return llama3(factors, theta, rotary, kind)
    if kind == "none":
        return None
    key = "rope.scaling.factor" if "rope.scaling.factor" in given else "rope.scale_linear"
    factor = given.number(key, float)
    return None if factor == 1 else {"rope_type": "linear", "type": "linear", "factor": factor}


def llama3(factors: np.ndarray, theta: float, rotary: int, kind: str) -> dict[str, Any]:
    """Returns the scaling whose frequencies are divided by these factors."""
    factor, cpu = float(str(factors.max())), torch.device("cpu")
    for original in (1 << power for power in range(4, 21)):
        scaling = RopeScaling("llama3", factor, original_positions=original)
        divisors = rope_frequencies(rotary, theta, None, cpu) / rope_frequencies(rotary, theta, scaling, cpu)
        if kind == "none" and factor > 1 and np.allclose(divisors, factors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    expected = "low_freq_factor 1, high_freq_factor 4, any power of 2 positions"
    raise ModelError(f"{DIVISORS} is no llama3 scaling ({expected})")


def numbers(given: Any, name: str, count: int) -> np.ndarray:
    """Returns a vector of the file."""
    values = np.asarray(given.stored[name].data)
    if values.shape != (count,) or values.dtype != np.float32 or not np.isfinite(values).all():
        raise ModelError(f"{name} must be {count} finite float32")
    return values
