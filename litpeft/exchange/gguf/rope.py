"""Rotary positions in the header of a GGUF file, and as a config.json says them."""

import math
from typing import Any

import numpy as np
import torch

from litpeft.core.errors import ModelError
from litpeft.exchange.gguf.by_layer import proportional
from litpeft.exchange.gguf.layout import DIVISORS, LONGROPE
from litpeft.model.config import ModelConfig, RopeScaling
from litpeft.model.families import Gguf, family
from litpeft.model.frequencies import rope_frequencies
from litpeft.model.rope import FULL, ORIGINAL, PARTIAL, PROPORTIONAL, SLIDING, grown

SCALING = ("rope.scale_linear", *(f"rope.scaling.{key}" for key in (
    "type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "finetuned",
    "yarn_log_multiplier",
)))  # fmt: skip


MULTIPLIER = "rope.scaling.yarn_log_multiplier"
OF_QUERIES = {"attention.temperature_scale": "llama_4_scaling_beta"}  # key of the header -> of rope_parameters


def scaling_keys(config: ModelConfig, known: Gguf) -> dict[str, Any]:
    """Returns the keys of a header that say how positions are scaled.

    llama.cpp multiplies the size of what yarn rotates by 1 + 0.1 ln(factor), and by rope.scaling.attn_factor. It rounds
    yarn's bounds to whole dimensions (`truncate`). Of longrope only the factors and the size count, not `factor`.
    """
    scaling = config.main_rope.scaling
    if scaling is None or scaling.kind in ("llama3", PROPORTIONAL):
        return {}
    said = {"rope.scaling.type": scaling.kind}
    if scaling.kind == "linear":
        return said | {"rope.scaling.factor": scaling.factor}
    said["rope.scaling.original_context_length"] = scaling.original_positions
    if scaling.kind == "longrope":  # its factors are tensors
        return said | {"rope.scaling.attn_factor": scaling.attention_factor}
    said |= {"rope.scaling.factor": scaling.factor, "rope.scaling.yarn_beta_fast": scaling.beta_fast}
    said["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    if known.yarn_multiplier and math.isclose(scaling.attention_factor, 1, rel_tol=1e-6):
        return said | {MULTIPLIER: known.yarn_multiplier * mscale_all_dim(config, scaling.factor)}
    size = scaling.attention_factor / (1 + 0.1 * math.log(scaling.factor))
    return said if math.isclose(size, 1, rel_tol=1e-6) else said | {"rope.scaling.attn_factor": size}


def mscale_all_dim(config: ModelConfig, factor: float) -> float:
    """Returns the key that latent attention scales its scores by: D ** -0.5 * (1 + 0.1 key ln(factor)) ** 2."""
    if config.score_scale is None or factor <= 1:
        return 1.0
    return (math.sqrt(config.score_scale * config.head_dim**0.5) - 1) / (0.1 * math.log(factor))


def header_rope(given: Any, name: str) -> dict[str, Any]:
    """Returns the keys of config.json that say how the positions of a header rotate."""
    known = family(name).GGUF.named(given.arch)
    if known.graph.get("rotary_dim") == (0,):
        return {}
    width, heads = given.number("embedding_length", int), given.number("attention.head_count", int)
    head_dim = given.number("attention.key_length", int, max(width // heads, 1))
    rotary = given.number("rope.dimension_count", int, head_dim)
    theta = given.number("rope.freq_base", float, 10000.0)
    if "rope.dimension_count_swa" in known.keys:
        full = proportional(numbers(given, DIVISORS, head_dim // 2), theta)
        local = given.number("rope.freq_base_swa", float, 10000.0)
        return {"rope_parameters": {FULL: full, SLIDING: {"rope_theta": local, "rope_type": "default"}}}
    scaling = rope_scaling(given, theta, rotary, known)
    if scaling is not None and scaling["rope_type"] == "yarn" and not known.yarn_truncates:
        scaling["truncate"] = False
    rope = {"rope_theta": theta} | (scaling or {"rope_type": "default"})
    for key, spelt in OF_QUERIES.items():
        rope |= {spelt: given.number(key, float)} if key in known.keys and key in given else {}
    if "rope.dimension_count" in known.keys:
        rope[PARTIAL] = rotary / head_dim
    top = {ORIGINAL: rope[ORIGINAL]} if ORIGINAL in rope and hasattr(family(name).Keys, ORIGINAL) else {}
    if (old_names := getattr(family(name), "THETAS", None)) is None:
        return {"rope_parameters": rope} | top
    local = given.number("rope.freq_base_swa", float, 10000.0) if "rope.freq_base_swa" in known.keys else theta
    by_type = {FULL: rope, SLIDING: {"rope_theta": local, "rope_type": "default"}}
    older = {old_names[kind][0]: one["rope_theta"] for kind, one in by_type.items() if old_names[kind][0]}
    return {"rope_parameters": by_type, "rope_scaling": scaling} | older  # transformers 5, and older readers


def rope_scaling(given: Any, theta: float, rotary: int, known: Gguf) -> dict[str, Any] | None:
    """Returns the scaling as Hugging Face writes it, or None."""
    kind = given.own.get("rope.scaling.type", "linear" if "rope.scale_linear" in given else "none")
    kind = "longrope" if kind == "none" and LONGROPE[0] in given.stored else kind
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"rope scaling {kind!r} is not supported; convert reads none, linear, llama3, yarn and longrope"
        )
    if kind in ("yarn", "longrope"):
        return beyond(given, kind, rotary, known)
    if DIVISORS in given.stored:
        factors = numbers(given, DIVISORS, rotary // 2)
        if kind != "none" or not (factors == 1).all():
            return llama3(factors, theta, rotary, kind)
    if kind == "none":
        return None
    key = "rope.scaling.factor" if "rope.scaling.factor" in given else "rope.scale_linear"
    factor = given.number(key, float)
    return None if factor == 1 else {"rope_type": "linear", "type": "linear", "factor": factor}


def beyond(given: Any, kind: str, rotary: int, known: Gguf) -> dict[str, Any]:
    """Returns yarn or longrope as Hugging Face writes it."""
    context = given.number("context_length", int)
    original = given.number("rope.scaling.original_context_length", int, context)
    size = given.number("rope.scaling.attn_factor", float, 1.0)
    said = {"rope_type": kind, "type": kind, ORIGINAL: original}
    if kind == "longrope":
        short, long = (numbers(given, name, rotary // 2) for name in LONGROPE)
        said |= {"short_factor": [*map(float, short)], "long_factor": [*map(float, long)]}
        factor = context / original
        usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        return said if math.isclose(size, usual, rel_tol=1e-6) else said | {"attention_factor": size}
    said["factor"] = factor = given.number("rope.scaling.factor", float)
    for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        said[key] = given.number(f"rope.scaling.yarn_{key}", float, usual)
    if known.yarn_multiplier and MULTIPLIER in given:
        all_dims = float(f"{given.number(MULTIPLIER, float) / known.yarn_multiplier:.6g}")
        one = all_dims if "attention.kv_lora_rank" in given else 1.0
        said |= {"mscale": one, "mscale_all_dim": all_dims}
        return said if size == 1 else said | {"attention_factor": size * grown(factor, one) / grown(factor, all_dims)}
    return said if size == 1 else said | {"attention_factor": size * (1 + 0.1 * math.log(factor))}


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
                ORIGINAL: original,
            }
    expected = "low_freq_factor 1, high_freq_factor 4, any power of 2 positions"
    raise ModelError(f"{DIVISORS} is no llama3 scaling ({expected})")


def numbers(given: Any, name: str, count: int) -> np.ndarray:
    """Returns a vector of the file."""
    values = np.asarray(given.stored[name].data) if name in given.stored else np.zeros(0)
    if values.shape != (count,) or values.dtype != np.float32 or not np.isfinite(values).all():
        raise ModelError(f"{name} must be {count} finite float32")
    return values
