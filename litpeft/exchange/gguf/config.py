"""config.json of a llama model, from the header of its GGUF file."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from litpeft.core.errors import ModelError
from litpeft.model.config import RopeScaling
from litpeft.model.frequencies import rope_frequencies

LARGEST_WIDTH = 1 << 20
LARGEST_CONTEXT = 1 << 31
# The llama.* keys that config.json can express, or that have no effect.
KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scale_linear",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip


def hf_config(values: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns config.json without dtype and special tokens; `stored` are the file's tensors by name."""
    refuse_unknown(values)
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("there is no matrix token_embd.weight")
    layers = number(values, "block_count", int)
    if layers > len(stored):
        raise ModelError(f"{len(stored)} tensors cannot be {layers} layers")
    width, heads = number(values, "embedding_length", int), number(values, "attention.head_count", int)
    kv_heads = number(values, "attention.head_count_kv", int, heads)
    head_dim = number(values, "attention.key_length", int, max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := number(values, key, int, head_dim)) != head_dim:
            needs = f"a Hugging Face Llama needs it to be the size of a head, {head_dim}"
            raise ModelError(f"llama.{key} = {other}: {needs}")
    if head_dim % 2 or heads % kv_heads or heads * head_dim > LARGEST_WIDTH:
        sizes = f"{heads} query and {kv_heads} key/value heads of size {head_dim}"
        raise ModelError(f"{sizes} do not make an attention")
    theta = single(number(values, "rope.freq_base", float, 10000.0))
    scaling = rope_scaling(values, stored, theta, head_dim)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": width,
        "intermediate_size": number(values, "feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": number(values, "context_length", int),
        "rms_norm_eps": single(number(values, "attention.layer_norm_rms_epsilon", float)),
        # for transformers 5, and for older readers
        "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": "blk.0.attn_q.bias" in stored,
        "mlp_bias": "blk.0.ffn_up.bias" in stored,
        "tie_word_embeddings": "output.weight" not in stored,
    }


def refuse_unknown(values: Mapping[str, Any]) -> None:
    """Raises for keys that config.json cannot express: experts, scales of the residual, ..."""
    unknown = [key for key in values if key.startswith("llama.") and key.removeprefix("llama.") not in KEYS]
    unknown = [key for key in unknown if not (key.startswith("llama.expert") and values[key] == 0)]
    if unknown:
        said = ", ".join(f"{key} = {values[key]}" for key in unknown[:5])
        raise ModelError(f"a Hugging Face Llama cannot express {said}")


def number(values: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Returns the header's llama.`key`, or `default`; it must be of this type, positive and of a plausible size."""
    value = values.get(f"llama.{key}", default)
    top = LARGEST_CONTEXT if key == "context_length" else LARGEST_WIDTH
    if type(value) is kind and value > 0 and (math.isfinite(value) if kind is float else value <= top):
        return value
    allowed = "a positive number" if kind is float else f"an integer from 1 to {top}"
    hint = "the header is damaged, or of a model that is no Llama"
    raise ModelError(f"llama.{key} must be {allowed}, got {value}", hint=hint)


def single(value: float) -> float:
    """Returns the shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(
    values: Mapping[str, Any], stored: Mapping[str, Any], theta: float, head_dim: int
) -> dict[str, Any] | None:
    """Returns the RoPE scaling as Hugging Face writes it, or None."""
    kind = values.get("llama.rope.scaling.type", "linear" if "llama.rope.scale_linear" in values else "none")
    if kind not in ("none", "linear"):
        raise ModelError(f"rope scaling {kind!r} is not supported; convert reads none, linear and llama3")
    frequencies = stored.get("rope_freqs.weight")
    if frequencies is None:
        if kind == "none":
            return None
        key = "rope.scaling.factor" if "llama.rope.scaling.factor" in values else "rope.scale_linear"
        factor = single(number(values, key, float))
        return None if factor == 1 else {"rope_type": "linear", "type": "linear", "factor": factor}
    factors = np.asarray(frequencies.data)
    if factors.shape != (head_dim // 2,) or factors.dtype != np.float32 or not np.isfinite(factors).all():
        raise ModelError(f"rope_freqs.weight must be {head_dim // 2} finite float32")
    if kind == "none" and (factors == 1).all():
        return None
    factor, cpu = single(factors.max()), torch.device("cpu")
    for original in (1 << power for power in range(4, 21)):
        scaling = RopeScaling("llama3", factor, original_positions=original)
        divisors = rope_frequencies(head_dim, theta, None, cpu) / rope_frequencies(head_dim, theta, scaling, cpu)
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
    raise ModelError(f"rope_freqs.weight is no llama3 scaling ({expected})")
