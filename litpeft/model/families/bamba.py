"""Bamba: LLaMA of which half of each head rotates; most layers are Mamba's.

The dropout and the extra loss that its config.json may name (attention_dropout, z_loss_coefficient) are not applied.
"""

from dataclasses import dataclass
from typing import Any, Literal

from litpeft.model.config import ModelConfig
from litpeft.model.families import falcon_h1, llama
from litpeft.model.families.mamba2 import Mamba2Keys, mamba_names, state_space
from litpeft.model.parts import Layer, Rope

NAMES = falcon_h1.NAMES | mamba_names("model.layers.{}.mamba")
BUFFERS = llama.BUFFERS


@dataclass(frozen=True)
class Keys(Mamba2Keys):
    """What decides the logits of transformers' BambaConfig, beside the rotary positions."""

    vocab_size: int = 128000
    tie_word_embeddings: bool = False
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    hidden_act: Literal["silu", "swish"] = "silu"
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 262144
    attn_layer_indices: list[int] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    ALIASES = {"layer_types": "layers_block_type"}


def config(hf: dict[str, Any]) -> ModelConfig:
    """Returns the ModelConfig that a config.json of BambaForCausalLM describes."""
    keys = Keys.read(hf)
    config = llama.usual(keys, {key: hf[key] for key in hf if key != "partial_rotary_factor"}, share=0.5)
    if config.n_layers > 10_000:  # before that many are made
        raise ValueError(f"num_hidden_layers {config.n_layers} is not supported")
    mamba = Layer(state_space=state_space(keys, hf))
    full, own = Layer(rope=Rope(config.rope_theta, config.rope_scaling)), keys.attn_layer_indices or ()
    return config.with_layers(full if layer in own else mamba for layer in range(config.n_layers))
