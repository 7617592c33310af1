"""LLaMA and models of its architecture: Llama 2 and 3, SmolLM2, TinyLlama.

The dropout that its config.json may name (attention_dropout) is not applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ACTIVATIONS, ConfigKeys, ModelConfig, checked
from litpeft.model.families import Gguf
from litpeft.model.rope import rope_settings

NAMES = {
    "embed": "model.embed_tokens",
    "blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "blocks.{}.attn.q": "model.layers.{}.self_attn.q_proj",
    "blocks.{}.attn.k": "model.layers.{}.self_attn.k_proj",
    "blocks.{}.attn.v": "model.layers.{}.self_attn.v_proj",
    "blocks.{}.attn.o": "model.layers.{}.self_attn.o_proj",
    "blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
BUFFERS = ("*.rotary_emb.inv_freq",)
EITHER = (False, True)
GGUF = Gguf("llama", pairs=True, graph={"qkv_bias": EITHER, "output_bias": EITHER, "mlp_bias": EITHER})


@dataclass(frozen=True)
class Keys(ConfigKeys):
    """What decides the logits of transformers' LlamaConfig, beside the rotary positions."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: Literal["silu", "swish"] = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_dim: int | None = None


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of LlamaForCausalLM describes."""
    return usual(Keys.read(hf), hf)


def usual(
    keys: ConfigKeys, hf: Mapping[str, Any], theta: float = 10000.0, share: float | None = None, **switches: Any
) -> ModelConfig:
    """Returns the ModelConfig of keys that are named as Llama's; `switches` are set beside them or in their place.

    `theta` and `share` are the defaults of the rotary positions; without a share heads rotate whole.
    """
    width, heads = keys.hidden_size, keys.num_attention_heads
    head_dim = checked("head_dim", hf.get("head_dim", getattr(keys, "head_dim", None)), int | None)
    if head_dim is None and width % heads:
        raise ValueError(f"hidden_size {width} is no multiple of num_attention_heads {heads}, and there is no head_dim")
    head_dim = head_dim or width // heads
    base, part, scaling = rope_settings(hf, keys.max_position_embeddings, default_share=share or 1, default_theta=theta)
    if share is None and scaling is not None and part != 1:  # without a scaling those classes ignore it
        raise ValueError(f"partial_rotary_factor {part} with rope_type {scaling.kind} is not supported; only 1 is")
    biased = getattr(keys, "attention_bias", False)
    values = {
        "vocab_size": keys.vocab_size,
        "d_model": width,
        "n_layers": keys.num_hidden_layers,
        "n_heads": heads,
        "n_kv_heads": keys.num_key_value_heads or heads,
        "head_dim": head_dim,
        "d_ff": getattr(keys, "intermediate_size", None),
        "max_positions": keys.max_position_embeddings,
        "norm_eps": getattr(keys, "rms_norm_eps", 1e-5),
        "rotary_dim": None if share is None else int(head_dim * part),
        "rope_theta": base,
        "rope_scaling": scaling,
        "tie_embeddings": keys.tie_word_embeddings,
        "activation": switches.get("activation") or ACTIVATIONS[getattr(keys, "hidden_act", "silu")],
        "qkv_bias": biased,
        "output_bias": biased,
        "mlp_bias": getattr(keys, "mlp_bias", False),
    }
    return ModelConfig(**(values | switches))
